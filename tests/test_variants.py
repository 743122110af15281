"""docs/variants.md does what it says: its code against float64, its pictures, its drawings."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GPU, check

import triflash
from triflash import cli
from triflash.masks import EMPTY, FULL, PARTIAL, Blocks, seen
from triflash.testing import Case

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "variants.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PICTURES = re.findall(r"!\[.*?\]\(variants/(\w+)\.png\)\n\n`triflash (mask .*?)`", PAGE)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The module that the page's blocks of code are: importing it runs them all."""
    path = tmp_path_factory.mktemp("variants") / "variants.py"
    path.write_text("\n\n".join(CODE), encoding="utf-8")
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location("variants", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["variants"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["variants"]


def _ids(case: Case, device: torch.device) -> tuple[torch.Tensor]:
    position = torch.arange(max(case.seqlen_q, case.seqlen_k), device=device, dtype=torch.int32)
    return ((position[: case.seqlen_k] // 29).expand(case.batch, -1).contiguous(),)


def _table(case: Case, device: torch.device) -> tuple[torch.Tensor, int]:
    values = torch.linspace(-2, 2, case.nheads * 20, device=device)
    return values.view(case.nheads, 20).requires_grad_(), 20


VARIANTS = {
    "causal": {"causal": True},
    "window": {"window_size": (20, 0)},
    "document": {"mask_mod": "document", "make_aux": _ids},
    "causal document": {"mask_mod": "document", "make_aux": _ids, "causal": True},
    "prefix_lm": {"mask_mod": "prefix_lm", "make_aux": lambda *_: (33,)},
    "dilated": {"mask_mod": "dilated", "make_aux": lambda *_: (8, 3), "causal": True},
    "document blocks": {"mask_mod": "document", "make_aux": _ids, "block_size": (64, 64)},
    "causal document blocks": {
        "mask_mod": "document", "make_aux": _ids, "causal": True, "block_size": (64, 64),
    },
    "prefix blocks": {
        "mask_mod": "prefix_lm", "make_aux": lambda *_: (33,), "block_size": (64, 64),
    },
    "dilated blocks": {
        "mask_mod": "dilated", "make_aux": lambda *_: (64, 3), "causal": True,
        "block_size": (64, 64),
    },
    "both": {"mask_mod": "both", "make_aux": lambda *_: (8, 3)},
    "either": {"mask_mod": "either", "make_aux": lambda *_: (8, 3)},
    "soft": {"score_mod": "soft", "make_aux": lambda *_: (2.0,), "causal": True},
    "relative": {"score_mod": "relative", "make_aux": _table, "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["v2", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_against_float64(name, implementation, page, device):
    what = {k: getattr(page, v) if isinstance(v, str) else v for k, v in VARIANTS[name].items()}
    n, nheads = (700, 2) if GPU else (90, 2 if name == "relative" else 1)  # whose tables differ
    case = Case(1, n, n, nheads, nheads, headdim=16, with_dlse=True, **what)
    if name == "relative":
        case = replace(case, dtype=torch.float32)
    check(case, implementation, device)


def test_the_page_ran(page):
    """Its calls gave what they say: gradients, and packed documents equal to masked ones."""
    assert page.table.grad.abs().sum() > 0
    assert page.q.grad.abs().sum() > 0
    masked = triflash.attention(
        page.q, page.k, page.v, causal=True, mask_mod=page.document, aux=(page.ids,)
    )
    torch.testing.assert_close(page.packed, masked[0], rtol=2e-3, atol=2e-3)


def test_variants_are_short():
    assert len(CODE) > 10
    for block in CODE:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 15, block


def test_there_is_a_picture_of_each_mask():
    assert {name for name, _ in PICTURES} == {path.stem for path in (DOCS / "variants").iterdir()}
    assert len(PICTURES) == 10


@pytest.mark.parametrize(("name", "command"), PICTURES, ids=lambda x: x.split()[0])
def test_pictures_are_what_the_commands_draw(name, command, page, tmp_path):
    """By the description that is in them; pixels differ between versions of matplotlib."""
    image = pytest.importorskip("PIL.Image")
    target = tmp_path / f"{name}.png"
    # The page's file runs for seconds, and has run.
    *flags, file = shlex.split(command.replace("variants.py:", "variants:"))
    assert file == target.name
    assert cli.main([*flags, str(target)]) == 0
    kept, drawn = (image.open(path).text for path in (DOCS / "variants" / file, target))
    assert re.search("pairs are visible|blocks visited", drawn["Description"])
    for key in ("Title", "Description"):
        assert kept[key] == drawn[key]


def test_the_drawing_on_the_page(capsys):
    command, drawing = re.search(
        r"```console\n\$ triflash (.*?)\n(.*?)```", PAGE, re.DOTALL
    ).groups()
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == drawing


def test_block_masks_are_what_their_masks_are(page):
    """The block masks of the page against the pairs that the modifications show."""
    for name, mod, aux, causal in (
        ("document_blocks", page.document, (page.long_ids.cpu(),), False),
        ("causal_document_blocks", page.document, (page.long_ids.cpu(),), True),
        ("prefix_blocks", page.prefix_lm, (300,), False),
        ("dilated_blocks", page.dilated, (64, 3), True),
    ):
        whole = seen(1024, 1024, causal=causal, mask_mod=mod, aux=aux)
        listed = Blocks.listed(getattr(page, name))
        assert torch.equal(listed.states, Blocks.of(whole, 64, 64).states)
        assert len({listed.count(state) for state in (EMPTY, PARTIAL, FULL)} - {0}) > 1


def test_documents_are_drawn_as_the_page_masks_them(page):
    """--document is of packed sequences; the page's modification is another way to say it."""
    for causal in (False, True):
        packed = seen(256, 256, causal=causal, documents=[75, 125, 56])
        masked = seen(256, 256, causal=causal, mask_mod=page.document, aux=(page.ids.cpu(),))
        assert torch.equal(packed, masked)
