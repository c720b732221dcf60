"""COCO's numbers over any predict function.

evaluator.py   CocoEvaluator, evaluate: detections in, metrics out
backends.py    hotcoco, faster-coco-eval, pycocotools behind one function
overlaps.py    detections <-> objects at an overlap
metrics.py     the numbers, a row per class, the threshold of the best F1
results.py     COCO's results format
"""

from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator, evaluate
from ddetr.evaluation.metrics import ClassMetrics, Metrics

__all__ = ["BACKENDS", "ClassMetrics", "CocoEvaluator", "Metrics", "evaluate"]
