"""What was measured, for people: one self-contained HTML file, terminal tables, JSON and Markdown.

Nothing here computes a result. Names of layers, tensors and contestants are hostile input in every format.
"""

from __future__ import annotations

from edgec.report.frontier_tables import read_frontier
from edgec.report.html import write_report
from edgec.report.tables import measurement_table, plan_table, to_csv, to_json, to_markdown

__all__ = ["measurement_table", "plan_table", "read_frontier", "to_csv", "to_json", "to_markdown", "write_report"]
