"""Which options were given: what `ddetr train --weights` may take from the file instead are the others."""

from pathlib import Path

from ddetr.cli.parser import Parser
from ddetr.cli.training import add_training_options, training_config


def test_options_of_the_network_that_were_not_given_are_left_to_its_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  num_queries: 300\n")  # the default, and said
    parser = Parser("train", "")
    add_training_options(parser)
    arguments = ["--data", "x", "--config", str(tmp_path / "mine.yaml"), "--model.two-stage", "false", "--epochs", "3"]
    settings = parser.read([*arguments, "--weights", "file.pth"])
    assert training_config(settings, parser.said).model == {"num_queries": 300, "two_stage": False}
    complete = training_config(parser.read(arguments), parser.said).model
    assert {"two_stage": False, "with_box_refine": True, "enc_layers": 6}.items() <= complete.items()
