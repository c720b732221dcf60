"""Parts of annotation files, as the tests of the readers write them."""

from typing import Any


def coco_object(image_id: int = 1, category_id: int = 3, bbox: Any = (4, 5, 20, 10), **more: Any) -> dict[str, Any]:
    box = list(bbox)
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "area": 150.0, "iscrowd": 0} | more


def voc_object(name: str = "cat", box: tuple[Any, ...] = (5, 6, 25, 16), difficult: int = 0) -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}<bndbox>{corners}</bndbox></object>"


def voc_xml(objects: list[str], size: str = "<size><width>64</width><height>48</height><depth>3</depth></size>") -> str:
    return f"<annotation><filename>x.jpg</filename>{size}\n{''.join(objects)}\n</annotation>"
