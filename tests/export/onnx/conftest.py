"""The `export` fixture: each small model is built and exported once per session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from decoder_cases import Exported, make_config, make_model, save, write_runtime_folder

from edgec.export.onnx.decoder import build_decoder, share_tied_table


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in done:
            base = tmp_path_factory.mktemp("decoder")
            model = make_model(make_config(name))
            source = save(base / "source", model)
            graph = build_decoder(source, base)
            share_tied_table(graph)
            done[name] = Exported(model, source, graph, write_runtime_folder(graph, base / "out"))
        return done[name]

    return make
