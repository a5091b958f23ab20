"""Tables with an entry for every quantization that specchat applies itself."""

import pytest

from specchat.models.sizes.known_specs import _OWN_QUANTS
from specchat.models.weights.recipe import QUANTIZERS, recipe_for
from specchat.planner.rates import _DEQUANTIZE_CORE_S
from specchat.records.model import LOWER_QUANTS, QUANTS, own_quant


@pytest.mark.parametrize("table", [_OWN_QUANTS, QUANTIZERS, _DEQUANTIZE_CORE_S], ids=["sizes", "quantizers", "rates"])
def test_tables_have_every_own_quant(table: dict[str, object]):
    assert set(table) == set(LOWER_QUANTS) == set(QUANTS) - {"none"}


def test_only_own_quants_have_recipes():
    assert [own_quant(name) for name in (*QUANTS, "gptq int4", "int2")] == [*QUANTS, "none", "none"]
    assert [recipe_for(name) is None for name in (*QUANTS, "gptq int4")] == [True, False, False, False, True]
    assert recipe_for("int4").name == "int4"
