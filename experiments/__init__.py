"""What measures and documents the package: studies, benchmark, fault injection, RESULTS.md."""
