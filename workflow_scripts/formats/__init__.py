"""Distilled sets as others read them: folders of PNGs, WebDataset shards, a folder for the Hugging Face hub, a tensor file."""

from typing import Literal

Format = Literal["imagefolder", "webdataset", "huggingface", "safetensors"]
