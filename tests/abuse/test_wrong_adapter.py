"""Adapters that do not exist or are for another base model: the model stays as it was, the session is given back."""

import copy
from collections.abc import Iterator

import pytest
from torch import nn
from transformers import PreTrainedModel

from abuse.support import ADAPTER, attention_adapter, clear_error, eventually, lora, served, session, tiny_llama
from splitveil import connect, disconnect
from splitveil.adapters import LoraModule
from splitveil.errors import BaseModelError, ConfigurationError, KeyRejectedError, SplitveilError, UnknownAdapterError
from splitveil.serving.connect import connection
from splitveil.serving.server import Server


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def untouched(llama: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The base model, which must have no hooks when the test is over."""
    yield llama
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    with pytest.raises(ConfigurationError, match="not connected"):
        connection(llama)


@pytest.mark.parametrize("name", ["other", "Clinic", "clinic ", "../clinic", "ключ", "n" * 128])
def test_an_adapter_that_is_not_served(name: str, server: Server, untouched: PreTrainedModel) -> None:
    with clear_error(UnknownAdapterError, match="serves no adapter named"):
        connect(untouched, server.address, name)


@pytest.mark.parametrize("name", ["", "n" * 129, "a\nb", "\x1b[2J", "\ud800"])
def test_a_name_that_no_adapter_can_have(name: str, server: Server, untouched: PreTrainedModel) -> None:
    with clear_error(ConfigurationError, match="must be printable and 1 to 128 characters long"):
        connect(untouched, server.address, name)


Q_PROJ = "model.layers.0.self_attn.q_proj"
FOREIGN: dict[str, tuple[list[LoraModule], str]] = {
    "more inputs": ([lora(Q_PROJ, 24, 16)], "maps 16 to 16 features, the adapter 24 to 16"),
    "more outputs": ([lora(Q_PROJ, 16, 32)], "maps 16 to 16 features, the adapter 16 to 32"),
    "a block too many": ([lora("model.layers.2.self_attn.q_proj", 16, 16)], "has no module model.layers.2"),
    "another family": ([lora("transformer.h.0.attn.c_attn", 16, 48)], "has no module transformer.h.0"),
    "the second module only": ([lora(Q_PROJ, 16, 16), lora("model.norm2", 16, 16)], "has no module model.norm2"),
    "a module that is not linear": ([lora("model.norm", 16, 16)], "model.norm is a LlamaRMSNorm, not a linear module"),
    "an embedding": ([lora("model.embed_tokens", 64, 16)], "model.embed_tokens is a Embedding, not a linear"),
    "a block": ([lora("model.layers.0", 16, 16)], "not a linear module"),
    "a tensor": ([lora(Q_PROJ + ".weight", 16, 16)], "has no module"),
    "a property": ([lora("device", 16, 16)], "has no module device"),
    "a method": ([lora("generate", 16, 16)], "has no module generate"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_adapter_for_another_base(case: str, untouched: PreTrainedModel) -> None:
    modules, match = FOREIGN[case]
    with Server({ADAPTER: served(modules)}, "127.0.0.1:0", sessions=1) as server:
        with clear_error(BaseModelError, match=match):
            connect(untouched, server.address, ADAPTER, allow_insecure=True)

        def has_room() -> bool:
            try:
                session(server.address).close()
            except SplitveilError:
                return False
            return True

        eventually(has_room)


def test_a_name_of_the_adapter_runs_no_code_of_the_model() -> None:
    """Module names are the server's choice; a look-up must not evaluate the model's properties."""

    class Trap(nn.Module):
        @property
        def device(self) -> object:
            raise RuntimeError("evaluated")

    adapter = served([lora("device.x", 16, 16)])
    with Server({ADAPTER: adapter}, "127.0.0.1:0") as hostile, clear_error(BaseModelError, match="no module device"):
        connect(Trap(), hostile.address, ADAPTER, allow_insecure=True)


def test_connecting_twice_is_an_error_that_changes_nothing(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    with Server({ADAPTER: attention_adapter()}, "127.0.0.1:0") as server:
        connect(model, server.address, ADAPTER, allow_insecure=True)
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        with clear_error(ConfigurationError, match=r"connected already; call splitveil.disconnect"):
            connect(model, server.address, ADAPTER, allow_insecure=True)
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
        disconnect(model)
        disconnect(model)
        connect(model, server.address, ADAPTER, allow_insecure=True)
        disconnect(model)


def test_keys_and_tls_are_refused_rather_than_ignored(server: Server, untouched: PreTrainedModel) -> None:
    with pytest.raises(ConfigurationError, match=r"ClientTLS\('ca\.pem'\)"):
        connect(untouched, server.address, ADAPTER, tls="ca.pem")  # type: ignore[arg-type]
    with pytest.raises(KeyRejectedError, match="knows no API keys") as caught:
        connect(untouched, server.address, ADAPTER, api_key="secret")
    assert "secret" not in str(caught.value)
