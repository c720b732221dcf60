"""Network outputs to detections in pixels (official arithmetic: facts of `PostProcess`)."""

from typing import Any

import torch
from torch import Tensor, nn

from ddetr.boxes import box_cxcywh_to_xyxy
from ddetr.runtime.transfer import sent


class PostProcess(nn.Module):
    """The best (query, class) pairs of each image: no threshold, no suppression; a query may give several classes."""

    def __init__(self, max_detections: int = 100):
        """max_detections: detections per image, 100 as in COCO's evaluation; fewer where there are fewer pairs."""
        super().__init__()
        self.max_detections = max_detections

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], target_sizes_hw: Tensor) -> list[dict[str, Tensor]]:
        """
        Args:
            outputs: `pred_logits` (N, Q, K), `pred_boxes` (N, Q, 4) cxcywh in [0, 1].
            target_sizes_hw: (N, 2) as (h, w), best on the host: the original image for evaluation, the shown one for
                drawing.

        Returns:
            N dicts, best first: `scores` (k,) in [0, 1], `labels` (k,), `boxes` (k, 4) xyxy in pixels.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if target_sizes_hw.shape != (logits.shape[0], 2):
            raise ValueError(f"target_sizes_hw must be ({logits.shape[0]}, 2), got {tuple(target_sizes_hw.shape)}")
        num_classes = logits.shape[-1]
        probabilities = logits.sigmoid().flatten(1)  # (N, Q*K)
        scores, pairs = probabilities.topk(min(self.max_detections, probabilities.shape[1]), dim=1)
        queries = torch.div(pairs, num_classes, rounding_mode="floor")
        boxes_xyxy = box_cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
        boxes_xyxy = boxes_xyxy * sent(target_sizes_hw.to(boxes.dtype), boxes.device).flip(1).repeat(1, 2)[:, None]
        return [
            {"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, pairs % num_classes, boxes_xyxy)
        ]
