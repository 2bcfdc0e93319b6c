"""Annotation formats beside COCO: one module each, found by `maskx.data.formats.table`."""
