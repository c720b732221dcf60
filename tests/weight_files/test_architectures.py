"""Networks that are none of ours are called by their names."""

import pytest

from ddetr.weight_files.architectures import architecture_of

# As the state dicts of these projects begin, or what is peculiar to them.
DETECTORS = {
    "DETR": ["backbone.0.body.layer4.0.conv1.weight", "input_proj.weight", "class_embed.weight"],
    "DETR ": ["model.input_projection.weight", "class_labels_classifier.weight", "bbox_predictor.layers.0.weight"],
    "RT-DETR": ["backbone.res_layers.0.blocks.0.branch2a.conv.weight", "decoder.dec_score_head.0.weight"],
    "RT-DETR ": ["model.encoder.fpn_blocks.0.conv1.conv.weight", "model.decoder.class_embed.0.weight"],
    "D-FINE or DEIM": ["decoder.decoder.lqe_layers.0.reg_conf.layers.0.weight", "decoder.dec_score_head.0.weight"],
    "RF-DETR or LW-DETR": [
        "refpoint_embed.weight",
        "query_feat.weight",
        "transformer.decoder.ref_point_head.layers.0.w",
    ],
    "DAB-DETR or DN-DETR": ["refpoint_embed.weight", "transformer.decoder.ref_point_head.layers.0.weight"],
    "DINO, or a detector made from it": [
        "transformer.level_embed",
        "transformer.decoder.ref_point_head.layers.0.weight",
    ],
    "Grounding DINO": ["module.bert.encoder.layer.0.output.dense.weight", "x.self_attn.sampling_offsets.weight"],
    "Co-DETR": ["query_head.transformer.level_embeds", "rpn_head.rpn_conv.weight", "roi_head.0.bbox_head.fc.weight"],
    "DETA": ["transformer.level_embed", "transformer.pix_trans.weight"],
    "MS-DETR": [f"transformer.decoder.layers.0.linear{part}.weight" for part in (1, 2, 3, 4)],
    "Conditional DETR": ["transformer.decoder.layers.0.ca_qcontent_proj.weight", "class_embed.weight"],
    "Conditional DETR ": [
        "model.decoder.ref_point_head.layers.0.weight",
        "model.decoder.layers.1.encoder_attn.q_pos_sine_proj.weight",
    ],
    "YOLOS": ["vit.embeddings.detection_tokens", "vit.encoder.layer.0.attention.attention.query.weight"],
    "Faster R-CNN or a relative": ["rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"],
    "RetinaNet or a relative": ["backbone.body.layer4.0.conv1.weight", "head.classification_head.cls_logits.weight"],
    "YOLO": ["model.model.0.conv.weight", "model.model.2.cv1.conv.weight"],
    "YOLOX": ["backbone.backbone.dark2.0.conv.weight", "head.cls_preds.0.weight"],
    "MaskFormer or Mask2Former": ["sem_seg_head.pixel_decoder.mask_features.weight"],
}
BACKBONES = {
    "ResNet": ["conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight"],
    "ResNet, in detectron2's names": ["stem.conv1.weight", "res5.0.conv1.weight"],
    "Swin Transformer": ["layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.blocks.0.attn.qkv.weight"],
    "vision transformer": ["cls_token", "blocks.0.attn.qkv.weight"],
    "ConvNeXt": ["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"],
    "EfficientNet": ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_fc.weight"],
    "EfficientNet, MobileNet or a relative": ["conv_stem.weight", "blocks.0.0.conv_dw.weight"],
}


@pytest.mark.parametrize("name", DETECTORS)
def test_other_detectors(name: str) -> None:
    assert architecture_of(DETECTORS[name]) == (name.strip(), False)
    assert architecture_of(f"module.{one}" for one in DETECTORS[name]) == (name.strip(), False)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_alone(name: str) -> None:
    assert architecture_of(BACKBONES[name]) == (name, True)
    assert architecture_of([*BACKBONES[name], "decoder.bbox_embed.weight"]) is None


def test_nothing_is_guessed() -> None:
    assert architecture_of(["encoder.weight", "linear.bias"]) is None
    assert architecture_of([]) is None
