"""Makes a run's summary and plot again: python scripts/summarize.py --workdir=runs/stdlib_1m."""

from eco_optax.training import jobs, report

_WORKDIR = jobs.define_path("workdir", "runs/stdlib_1m", "Folder of a run, finished or not.")


def main(_: list[str]) -> None:
  """Writes summary.json and loss.png from run.json and metrics.jsonl."""
  print(report.closing_table(report.summarize(_WORKDIR.value)))


if __name__ == "__main__":
  jobs.run(main)
