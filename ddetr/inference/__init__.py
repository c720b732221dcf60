"""Images in, named objects out.

predictor.py             Predictor: images -> named objects in pixels
detections.py            Detections: what is found in an image
drawing.py               boxes and names on pictures
files.py                 files and folders -> annotated pictures and JSON
evaluate_checkpoint.py   a checkpoint and a data set -> COCO's metrics
optimize.py              a faster copy of a trained network
"""
