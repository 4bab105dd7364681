"""Shows what the sanitizers reported during a test run, and fails when there is anything.

sanitizer_reports.py DIRECTORY
"""

import sys
from pathlib import Path

reports = sorted(Path(sys.argv[1]).iterdir())
for report in reports:
    print(f"==== {report.name}\n{report.read_text(errors='replace')}")
print(f"{len(reports)} sanitizer reports")
sys.exit(bool(reports))
