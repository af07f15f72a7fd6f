"""Studies: questions, the runs that answer them, and the tables and figures of what came out."""
