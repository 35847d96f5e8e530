"""Trained students as ONNX or safetensors files, each with its model card.

May be imported by the commands alone.
"""
