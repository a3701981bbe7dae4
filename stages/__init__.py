"""Docsmith: one file per stage of dvc.yaml, and folders of code that stages share."""
