"""Exporters: a compressed model goes in, a folder that a runtime loads as it is comes out. One target per file."""
