"""The network and its loss, in the order in which data flows.

backbones/                  images -> feature maps [timm]
position_encoding.py        where a cell lies
attention.py                the multi-scale deformable attention module
sampling.py                 where it looks, recorded while a model runs
query_selection.py          which encoder proposals become queries (two-stage)
deformable_transformer.py   feature maps -> query states and boxes of every layer
heads.py                    query states -> class logits, box corrections
deformable_detr.py          the detector; `build_model` from the official flags
matcher.py                  predictions <-> objects [scipy]
auxiliary.py                queries that exist in training alone, and the second route of the decoder
criterion.py                the losses
postprocess.py              outputs -> detections in pixels
"""
