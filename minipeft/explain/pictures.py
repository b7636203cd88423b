"""One Transformer block as a picture, with a method's parts where they sit. Needs matplotlib (`minipeft[plots]`).

What is frozen, what is trained and where layers were put is read off an injected model; only how a kind of layer looks
is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.nn as nn

from minipeft.errors import ConfigError
from minipeft.explain.anatomy import config_of, counts_table, injected
from minipeft.files import check_writable, replacing_folder, write_text_file
from minipeft.methods import METHODS
from minipeft.methods.adapter import BottleneckAdapter
from minipeft.methods.dora import DoRALinear
from minipeft.methods.ia3 import IA3Linear
from minipeft.methods.injection import active_injections, base_parameters, trainable_parameters
from minipeft.methods.layers import AdapterLayer
from minipeft.methods.lora import LoRALinear
from minipeft.methods.prefix import Prefix
from minipeft.methods.prompt import Prompt
from minipeft.methods.vera import VeRALinear
from minipeft.methods.virtual_tokens import Table
from minipeft.model.hub import HUB_NAMES
from minipeft.runs.results import blank_figure

FROZEN, TRAINED, RANDOM, INK = "#e9e9ec", "#f6a13c", "#bcd3ea", "#26262b"
TITLES = {"full": "Full fine-tuning", "head": "Head only", "bitfit": "BitFit", "lora": "LoRA", "dora": "DoRA",
          "vera": "VeRA", "ia3": "(IA)³", "adapter": "Bottleneck adapters", "prompt": "Prompt tuning",
          "ptuning": "P-tuning", "prefix": "Prefix tuning"}
CENTER, WIDTH, HEIGHT, SIDE = 3.4, 2.9, 0.56, 6.6     # of the main column's boxes; where the side column stands
# The main column, from the bottom: name of the module in the model, text in the box, height of its center.
BOXES = [("wte", "wte + wpe", 1.5), ("h.0.ln_1", "ln_1", 2.9), ("h.0.attn.c_attn", "c_attn  (q, k, v)", 3.8),
         (None, "softmax(q kᵀ / √D) v", 4.95), ("h.0.attn.c_proj", "c_proj", 5.95), ("h.0.ln_2", "ln_2", 7.75),
         ("h.0.mlp.c_fc", "c_fc", 8.65), (None, "gelu", 9.5), ("h.0.mlp.c_proj", "c_proj", 10.35),
         ("ln_f", "ln_f", 12.75), ("score", "score", 13.6)]
PLUS_ATTENTION, PLUS_MLP, BLOCK = 6.95, 11.35, (2.3, 11.85)
GALLERY = """# Anatomy of the methods

Written by `python scripts/anatomy.py --all`. Trained parameters of each method in its default configuration (the
table in `minipeft/runs/defaults.py`), the two-label head included, counted on models of the official shapes:

{table}

One block of `{model}` with each method's parts:

{pictures}
"""


class Canvas:
    """A figure in which one unit is one unit high and wide, and the few shapes the picture is made of."""

    def __init__(self) -> None:
        self.figure = blank_figure(9.2, 11.6)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, 12)
        self.axes.set_ylim(0, 15.2)
        self.axes.axis("off")

    def box(self, x: float, y: float, text: str, color: str, width: float = WIDTH, height: float = HEIGHT,
            size: float = 13) -> None:
        from matplotlib.patches import FancyBboxPatch
        self.axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.09", facecolor=color,
            edgecolor=INK, linewidth=1.2, zorder=3))
        self.text(x, y, text, size)

    def funnel(self, x: float, bottom: float, top: float, low: float, high: float, text: str, color: str) -> None:
        """A trapezoid `low` wide at its bottom and `high` wide at its top."""
        from matplotlib.patches import Polygon
        corners = [(x - low / 2, bottom), (x + low / 2, bottom), (x + high / 2, top), (x - high / 2, top)]
        self.axes.add_patch(Polygon(corners, facecolor=color, edgecolor=INK, linewidth=1.2, zorder=3))
        self.text(x, (bottom + top) / 2, text)

    def circle(self, x: float, y: float, text: str, color: str = "white", radius: float = 0.23) -> None:
        from matplotlib.patches import Circle
        self.axes.add_patch(Circle((x, y), radius, facecolor=color, edgecolor=INK, linewidth=1.2, zorder=4))
        self.text(x, y, text, 13)

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        xs, ys = zip(*points)
        self.axes.plot(xs, ys, color=INK, linewidth=1.2, zorder=2, solid_capstyle="round")
        if arrow:
            self.axes.annotate("", xy=points[-1], xytext=points[-2], zorder=2,
                               arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0,
                                           "shrinkB": 0, "mutation_scale": 13})

    def text(self, x: float, y: float, text: str, size: float = 13, left: bool = False, weight: str = "normal") -> None:
        self.axes.text(x, y, text, fontsize=size, ha="left" if left else "center", va="center", color=INK, zorder=6,
                       weight=weight)


def draw(model: nn.Module, method: str, path: str | Path, subtitle: str = "") -> None:
    """Draw block 0 of an injected sequence classifier.

    Args:
        model: carries `method`; may be on the meta device.
        path: .png or .svg.

    Raises:
        ConfigError: another kind of file, or no matplotlib.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"a picture is a .png or a .svg file, not {path.name!r}")
    canvas = Canvas()
    _backbone(canvas, model)
    for injection in active_injections(model):
        for name, layer in injection.layers.items():
            place = name.removeprefix("transformer.")
            if place.startswith("h.0.") or not place.startswith("h."):
                _part(layer)(canvas, place, layer)
    count = trainable_parameters(model)
    canvas.text(0.7, 14.75, TITLES[method], 21, left=True, weight="bold")
    canvas.text(0.7, 14.3, subtitle or METHODS[method].summary, 12.5, left=True)
    canvas.axes.text(11.4, 15.0, f"{count.trainable:,} of {count.total:,}\nparameters trained "
                     f"({100 * count.trainable / count.total:.3g} %)", fontsize=12, ha="right", va="top", color=INK)
    _legend(canvas, random=any(isinstance(layer, VeRALinear) for injection in active_injections(model)
                               for layer in injection.layers.values()))
    with replacing_folder(path.parent) as temporary:
        canvas.figure.savefig(temporary / path.name, dpi=110, facecolor="white")


def gallery(folder: Path, model_name: str) -> Iterator[Path]:
    """A picture of every method, and a README.md that shows them beside the table of counts.

    Yields:
        Each file once it is written.

    Raises:
        ConfigError: no matplotlib.
        OutputError: the folder cannot be written.
    """
    check_writable(folder)
    config = config_of(model_name)
    for method in METHODS:
        draw(injected(config, method), method, folder / f"{method}.png")
        yield folder / f"{method}.png"
    table = counts_table({name: config_of(name) for name in ("mini", *HUB_NAMES)})
    pictures = "\n\n".join(f"## {TITLES[method]}\n\n![{TITLES[method]}]({method}.png)" for method in METHODS)
    write_text_file(folder / "README.md", GALLERY.format(table=table, model=model_name, pictures=pictures))
    yield folder / "README.md"


def _backbone(canvas: Canvas, model: nn.Module) -> None:
    """Embeddings, one block, the final LayerNorm and the head, colored by what is trained."""
    from matplotlib.patches import FancyBboxPatch
    trained = {name.removeprefix("transformer."): parameter.requires_grad
               for name, parameter in base_parameters(model).items()}
    low, high = BLOCK
    canvas.axes.add_patch(FancyBboxPatch((0.9, low), 10.4, high - low, boxstyle="round,pad=0,rounding_size=0.15",
                                         facecolor="none", edgecolor="#8a8a94", linewidth=1.2, linestyle=(0, (5, 4))))
    canvas.text(1.02, high + 0.22, f"block 0 of {model.config.n_layer}", 11.5, left=True)
    for i in range(5):
        canvas.box(CENTER - 0.92 + 0.46 * i, 0.62, "", "white", 0.38, 0.38)
    canvas.text(CENTER, 0.2, "tokens of the text", 11.5)
    heights = [0.81, *(y for _, _, y in BOXES)]
    for below, (_, _, y) in zip(heights, BOXES):
        canvas.line((CENTER, below + (HEIGHT / 2 if below != 0.81 else 0)), (CENTER, y - HEIGHT / 2))
    for name, text, y in BOXES:
        weight, bias = trained.get(f"{name}.weight", False), trained.get(f"{name}.bias", False)
        canvas.box(CENTER, y, text, TRAINED if weight else FROZEN if name else "white")
        if bias and not weight:
            canvas.box(CENTER + WIDTH / 2 + 0.3, y, "b", TRAINED, 0.42, 0.42)
    for start, end in ((2.55, PLUS_ATTENTION), (7.3, PLUS_MLP)):
        canvas.line((CENTER, start), (1.35, start), (1.35, end), (CENTER - 0.23, end))
        canvas.circle(CENTER, end, "+")


def _legend(canvas: Canvas, random: bool) -> None:
    kinds = [(TRAINED, "trained"), (FROZEN, "frozen"), (RANDOM, "random, frozen")][:2 + random]
    for i, (color, text) in enumerate(kinds):
        x = (6.6 if random else 7.6) + 1.5 * i
        canvas.box(x, 0.4, "", color, 0.34, 0.34)
        canvas.text(x + 0.25, 0.4, text, 12, left=True)


# --- how each kind of layer looks -------------------------------------------------------------------------------------

def _beside(canvas: Canvas, y: float) -> None:
    """Lines that lead from below a box to the side column and back above it."""
    canvas.line((CENTER, y - 0.38), (SIDE, y - 0.38), arrow=False)
    canvas.circle(CENTER, y + 0.43, "+", radius=0.15)
    canvas.line((SIDE, y + 0.43), (CENTER + 0.15, y + 0.43))


def _height(place: str) -> float:
    return next(y for name, _, y in BOXES if name == place)


def _low_rank(canvas: Canvas, place: str, layer: LoRALinear, color: str = TRAINED) -> None:
    y = _height(place)
    _beside(canvas, y)
    canvas.funnel(SIDE, y - 0.36, y, 1.5, 0.7, "A", color)
    canvas.funnel(SIDE, y + 0.04, y + 0.4, 0.7, 1.5, "B", color)


def _dora(canvas: Canvas, place: str, layer: DoRALinear) -> None:
    y = _height(place)
    _low_rank(canvas, place, layer)
    canvas.box(SIDE + 1.75, y + 0.02, "m", TRAINED, 0.5, 0.72)
    canvas.text(SIDE + 2.1, y + 0.02, "the length of each\nrow of W + s B A", 10.5, left=True)


def _vera(canvas: Canvas, place: str, layer: VeRALinear) -> None:
    y = _height(place)
    _low_rank(canvas, place, layer, RANDOM)
    canvas.box(SIDE + 1.3, y - 0.13, "d", TRAINED, 0.5, 0.3, 12)
    canvas.box(SIDE + 1.3, y + 0.27, "b", TRAINED, 0.5, 0.3, 12)
    canvas.text(SIDE + 1.7, y + 0.07, "scale what A\nand B give", 10.5, left=True)


def _ia3(canvas: Canvas, place: str, layer: IA3Linear) -> None:
    y = _height(place)
    at = y - 0.44 if layer.feedforward else y + 0.55
    canvas.circle(CENTER, at, "×", radius=0.15)
    canvas.line((SIDE - 1.1, at), (CENTER + 0.15, at))
    canvas.box(SIDE - 0.75, at, "l", TRAINED, 0.7, 0.4)
    canvas.text(SIDE - 0.25, at, "rescales its input" if layer.feedforward else "rescales its output", 11.5, left=True)


def _bottleneck(canvas: Canvas, place: str, layer: BottleneckAdapter) -> None:
    attention = place.startswith("h.0.attn")
    plus = PLUS_ATTENTION if attention else PLUS_MLP
    if layer.parallel:
        start = 8.18
        canvas.line((CENTER, start), (SIDE, start), (SIDE, 9.0), arrow=False)
        bottom = 9.0
    else:
        bottom = plus - 1.0
        canvas.line((CENTER, plus - 0.6), (SIDE - 1.3, plus - 0.6), (SIDE - 1.3, bottom - 0.2), (SIDE, bottom - 0.2),
                    (SIDE, bottom), arrow=False)
    canvas.funnel(SIDE, bottom, bottom + 0.42, 1.9, 0.8, "down", TRAINED)
    canvas.funnel(SIDE, bottom + 0.48, bottom + 0.9, 0.8, 1.9, "up", TRAINED)
    canvas.text(SIDE + 1.15, bottom + 0.45, f"adapter, {layer.down.out_features} wide inside", 11.5, left=True)
    canvas.line((SIDE, bottom + 0.9), (SIDE, plus), (CENTER + 0.23, plus))


def _vectors(canvas: Canvas, x: float, y: float, text: str = "", color: str = TRAINED) -> None:
    """Three of them stand for all; x is the first one's center."""
    for i in range(3):
        canvas.box(x + 0.46 * i, y, text, color, 0.38, 0.38, 11)


def _prompt(canvas: Canvas, place: str, layer: Prompt) -> None:
    y, count, learned = 1.5, layer.num_virtual_tokens, isinstance(layer.encoder, Table)
    _vectors(canvas, SIDE - 0.7, y, color=TRAINED if learned else "white")
    canvas.line((SIDE - 0.95, y), (CENTER + WIDTH / 2, y))
    if learned:
        canvas.text(SIDE + 0.6, y, f"{count} learned vectors\nbefore the text", 11.5, left=True)
        return
    canvas.line((SIDE + 2.35, y), (SIDE + 0.45, y))
    canvas.box(SIDE + 1.4, y, "network", TRAINED, 1.2)
    _vectors(canvas, SIDE + 2.6, y)
    canvas.text(SIDE - 0.9, 0.98, f"{count} vectors before the text, made of {count} learned ones", 11.5, left=True)


def _prefix(canvas: Canvas, place: str, layer: Prefix) -> None:
    y = 4.95
    _vectors(canvas, SIDE - 0.7, y + 0.24, "k")
    _vectors(canvas, SIDE - 0.7, y - 0.24, "v")
    canvas.line((SIDE - 0.95, y), (CENTER + WIDTH / 2, y))
    canvas.text(SIDE + 0.6, y, f"{layer.num_virtual_tokens} learned keys and values\nbefore the text's own,\n"
                "in every block", 11.5, left=True)


def _part(layer: AdapterLayer) -> Callable[[Canvas, str, Any], None]:
    if type(layer) not in PARTS:
        raise ConfigError(f"PARTS in minipeft/explain/pictures.py does not say how to draw a {type(layer).__name__}")
    return PARTS[type(layer)]


PARTS: dict[type[AdapterLayer], Callable[[Canvas, str, Any], None]] = {
    LoRALinear: _low_rank, DoRALinear: _dora, VeRALinear: _vera, IA3Linear: _ia3, BottleneckAdapter: _bottleneck,
    Prompt: _prompt, Prefix: _prefix}
