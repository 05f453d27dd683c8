"""Formats of instruction data by name: what a row means as a conversation."""

from megatron.bridge.data.instruction.formats.base import FORMATS as FORMATS
from megatron.bridge.data.instruction.formats.base import DatasetFormat as DatasetFormat
from megatron.bridge.data.instruction.formats.base import dataset_format as dataset_format
