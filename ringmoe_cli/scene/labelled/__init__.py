"""Labelled data as people keep it: folders, boxes, polygons, and what is held out."""
