"""What a run shows for itself, made from what lies in its folder: the model is never run for it. And what a data set
shows before a run.

validation.py   what a validation leaves: truth and detections, in one file
signature.py    whether a validation is this user's own, so that its pictures may be shown
analysis.py     detections against truth: confusion matrix, kinds of errors, a score per image
run_files.py    everything else in a run folder, however old, unfinished or damaged
charts.py       inline SVG
plots.py        matplotlib, for pictures in files
figures.py      which curves there are
tables.py       which tables
pictures.py     truth beside prediction
curves.py       curves.png
templates.py    HTML from templates, with frame.html, parts.html and style.css
page.py         report.html, with page.html
card/           a run for those who find it on the hub: model card, weights, configuration
data_pool.py    images of a data set, and which of them are shown
data_figures.py its numbers, as charts and rows
data_page.py    the page of `ddetr data show`, with data_page.html
"""

from ddetr.report.curves import draw_curves
from ddetr.report.page import REPORT_FILE, write_report
from ddetr.report.pictures import draw_pictures
from ddetr.report.run_files import RunFiles
from ddetr.report.validation import Validation, best_or_last

__all__ = ["REPORT_FILE", "RunFiles", "Validation", "best_or_last", "draw_curves", "draw_pictures", "write_report"]
