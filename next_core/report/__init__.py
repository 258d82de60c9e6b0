"""One HTML page about a run or a comparison, for a colleague to read: see ``next_core.report.write.write_report``."""
