"""The memory of a job's largest step in closed form: what `planning.simulation` counts, from shapes alone.

Terms follow the code of the step (`training/llama_layers.py`, `linear.py`, `head.py`): what a layer keeps for the
backward pass, and what exists beside it at the moments that can be the highest. A test holds them to the simulator.
Bytes are those of tensors; nothing here looks at a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.adapter_shapes import AdapterShape, adapter_shape, optimizer_bytes
from qlora_service.planning.largest_step import LargestStep, largest_step
from qlora_service.planning.layer_cost import DORA, FAST, LayerCost, layer_cost, resolved_dtype, virtual_tokens
from qlora_service.planning.memory import MIB, Category, Memory
from qlora_service.planning.shapes import Matrix, ModelShape
from qlora_service.planning.simulation.allocator import ROUNDING, rounded
from qlora_service.specs import JobSpec, Oft, PromptMethod, Quantization
from qlora_service.training.sizes import CPU_ROWS, HEAD_CHUNK

Bytes = dict[Category, int]
FLOAT = 4
CUBLAS_WORKSPACE = (2 * 4096 + 8 * 16) * 1024
FRAGMENTED_SHARE, FRAGMENTED_BYTES = 0.05, 80 * MIB
"""What the allocator reserves beyond what is allocated, fitted to the simulator: within 4 % of it from 4 GiB on"""


def memory(
    shape: ModelShape,
    spec: JobSpec,
    *,
    micro_batch_tokens: int,
    checkpointing: bool,
    cuda: bool = True,
    longest_tokens: int | None = None,
    compute_dtype: str | None = None,
) -> Memory:
    """What the job takes where its largest step needs most; the arguments are `planning.simulation.simulate`'s."""
    step = largest_step(
        spec,
        micro_batch_tokens=micro_batch_tokens,
        longest_tokens=longest_tokens or shape.longest_tokens(spec),
    )
    width = 2 if resolved_dtype(spec, cuda=cuda, auto=compute_dtype) == "bfloat16" else FLOAT
    adapter = adapter_shape(spec.adapter, shape)
    setting = _Setting(shape, spec, adapter, layer_cost(spec, shape), step, width, checkpointing, cuda)
    resident, paged = _resident(setting)
    highest = max(_moments(setting), key=lambda moment: sum(moment.values()))
    categories = {category: resident.get(category, 0) + highest.get(category, 0) for category in Category}
    allocated = sum(categories.values())
    fragmented = int(allocated * FRAGMENTED_SHARE) + FRAGMENTED_BYTES if cuda else 0
    return Memory(categories, allocated + fragmented, paged, adapter.parameters)


@dataclass(frozen=True)
class _Setting:
    """What the terms are made of."""

    shape: ModelShape
    spec: JobSpec
    adapter: AdapterShape
    way: LayerCost
    step: LargestStep
    width: int
    """Bytes of a number in the compute dtype"""
    checkpointing: bool
    cuda: bool

    @property
    def tokens(self) -> int:
        return self.step.tokens + len(self.step.lengths) * virtual_tokens(self.spec.adapter)

    @property
    def is_fast(self) -> bool:
        return self.way is FAST

    def stream(self, features: int) -> int:
        """An activation of so many features, in the compute dtype."""
        return self.tokens * features * self.width

    def rank(self, *modules: str) -> int:
        return sum(self.adapter.ranks.get(name, 0) for name in modules)


def _resident(s: _Setting) -> tuple[Bytes, int]:
    """What is there between two steps; and optimizer state that can page."""
    shape, quantization = s.shape, s.spec.quantization
    packed = [matrix_bytes(matrix, quantization, s.width) for matrix in shape.matrices.values()]
    vectors = shape.layers * 2 + 1
    embeddings = (1 if shape.tied else 2) * rounded(shape.vocabulary * shape.hidden * s.width)
    other = embeddings + vectors * rounded(shape.hidden * s.width) + s.width * _bias_and_norm_features(shape)
    experts = (shape.experts - 1) * 3 * shape.hidden * shape.intermediate * s.width
    weights = shape.layers * sum(weight for weight, _ in packed)
    unquantized = other + shape.layers * experts
    if quantization.type == "none":
        weights, unquantized = 0, unquantized + weights
    state, paged = optimizer_bytes(s.spec.training, s.adapter.tensors, cuda=s.cuda)
    if s.spec.adapter.method == "adalora":
        state += 3 * s.adapter.trained_bytes  # importance, and its mean and deviation over the steps
    return {
        Category.WEIGHTS: weights,
        Category.CONSTANTS: shape.layers * sum(constants for _, constants in packed),
        Category.UNQUANTIZED: unquantized,
        Category.ADAPTER: s.adapter.trained_bytes + FLOAT * s.adapter.frozen,
        Category.GRADIENTS: 0 if s.step.is_whole_step else s.adapter.trained_bytes,
        Category.OPTIMIZER: state,
        Category.WORKSPACE: CUBLAS_WORKSPACE if s.cuda else 0,
    }, paged


def matrix_bytes(matrix: Matrix, quantization: Quantization, width: int) -> tuple[int, int]:
    """A weight as it is stored, and its constants.

    NF4 and FP4: half a byte a weight and a float32 constant for 64; with double quantization a byte for 64 and a
    float32 for 256 of those (arXiv:2305.14314, section 3), and the tables of both codes.
    """
    out, inside = matrix
    size = out * inside
    if quantization.type == "none":
        return size * width, 0
    if quantization.type == "int8":
        return size, rounded(FLOAT * out)
    blocks = -(-size // 64)
    if not quantization.double_quant:
        return rounded(size // 2), rounded(FLOAT * blocks) + ROUNDING
    return rounded(size // 2), rounded(blocks) + rounded(FLOAT * -(-blocks // 256)) + 2 * ROUNDING + 1024


def _bias_and_norm_features(shape: ModelShape) -> int:
    biases = shape.queries + 2 * shape.keys if shape.attention_bias else 0
    return shape.layers * (biases + (2 * shape.head_dim if shape.head_norms else 0))


def _moments(s: _Setting) -> list[Bytes]:
    """What exists beside the resident bytes at each moment that can be the highest."""
    layers, gradient = s.shape.layers, s.adapter.trained_bytes
    saved = _saved_by_layer(s)
    kept = _kept_by_layer(s) if s.checkpointing else saved
    # Computed again, a layer has everything that it keeps but its input, which is there; int8 has it twice.
    again = saved if s.way.survives_checkpointing else saved - kept
    before_head = _inputs(s) + layers * kept
    at_last = before_head + (again if s.checkpointing else 0)
    at_first = at_last - (layers - 1) * kept
    # In a step of one micro-batch gradients grow while activations go: the last layer's moment, or the first's.
    grown = gradient if s.step.is_whole_step else 0
    moments = [_head_forward(s, before_head), _head_backward(s, before_head), {Category.GRADIENTS: grown}]
    backwards = [_mlp_backward(s), _attention_backward(s)] if s.is_fast else [_layer(s)]
    for base, gradients in ((at_last, 0), (at_first, grown and grown - s.adapter.layer_bytes())):
        moments += [_sum({Category.ACTIVATIONS: base, Category.GRADIENTS: gradients}, part) for part in backwards]
    if s.cuda and s.spec.training.optim == "adamw_torch":
        # torch's update of many tensors at once makes a square root of each second moment.
        moments.append({Category.GRADIENTS: grown, Category.OPTIMIZER: gradient})
    return moments


def _sum(*parts: Bytes) -> Bytes:
    return {category: sum(part.get(category, 0) for part in parts) for part in parts for category in part}


def _inputs(s: _Setting) -> int:
    """Ids, positions, predictors and targets, and the rotation's cosines and sines."""
    return 4 * 8 * s.tokens + 2 * s.stream(s.shape.head_dim)


def _saved_by_layer(s: _Setting) -> int:
    """What a layer keeps for its backward pass."""
    shape, way = s.shape, s.way
    qkv = shape.queries + 2 * shape.keys
    saved = s.stream(2 * shape.hidden + qkv + shape.queries + 2 * shape.intermediate)
    per_token = 2 * FLOAT + (FLOAT * shape.heads if s.cuda else 0)  # scales of the norms; of the softmax
    per_token += s.rank(*shape.matrices) * (way.rank_width or s.width)
    if shape.head_norms and s.is_fast:
        saved += s.stream(shape.queries + shape.keys)
        per_token += FLOAT * (shape.heads + shape.kv_heads)
    if way.keeps_inputs:
        saved += s.stream(2 * shape.hidden + shape.intermediate)
    for name in s.adapter.by_module:
        out, inside = shape.matrices.get(name, (0, 0))
        per_token += int(way.of_input * inside + way.of_output * out)
        saved += _rotation_bytes(s, inside)
    return saved + per_token * s.tokens


def _rotation_bytes(s: _Setting, inside: int) -> int:
    """OFT's: blocks along the input's diagonal, in four steps from the skew-symmetric matrix to the rotation."""
    adapter = s.spec.adapter
    return 4 * FLOAT * adapter.oft_block_size * inside if isinstance(adapter, Oft) else 0


def _kept_by_layer(s: _Setting) -> int:
    """What a layer keeps although it is computed again."""
    kept = s.stream(s.shape.hidden)
    if s.way.survives_checkpointing:
        kept += s.stream(2 * s.shape.hidden + s.shape.queries + s.shape.intermediate)
    return kept


def _layer(s: _Setting) -> Bytes:
    """What a layer that is not of the fast path has beside what it keeps."""
    hidden, intermediate = s.way.beside_recomputed if s.checkpointing else s.way.beside
    # The terms are of two bytes for a number, or of float32 whatever the rest is.
    beside = s.tokens * (hidden * s.shape.hidden + intermediate * s.shape.intermediate) * (s.width / 2)
    # DoRA adds A and B to the weight, packed or not.
    unpacks = s.spec.quantization.type in {"nf4", "fp4"} or s.way is DORA
    weight = int(s.way.per_weight * s.shape.hidden * s.shape.intermediate) if unpacks else 0
    return {Category.RECOMPUTATION: int(beside), Category.DEQUANTIZATION: weight}


def _head_forward(s: _Setting, before: int) -> Bytes:
    """A chunk of logits, with its probabilities in float32; the hidden states, normed, and their gradient.

    Prompt methods have the logits of all documents, and two gradients of those of one.
    """
    if isinstance(s.spec.adapter, PromptMethod):
        everything = s.step.tokens + 2 * max(s.step.lengths)
        return {Category.ACTIVATIONS: before, Category.LOGITS: FLOAT * s.shape.vocabulary * everything}
    chunk = min(HEAD_CHUNK, s.tokens)
    wide = 2 if s.width < FLOAT else 1
    rows = chunk if s.cuda else min(CPU_ROWS, chunk)
    logits = s.shape.vocabulary * (chunk * s.width + rows * FLOAT * wide)
    return {Category.ACTIVATIONS: before + s.stream(3 * s.shape.hidden), Category.LOGITS: logits}


def _head_backward(s: _Setting, before: int) -> Bytes:
    """The final norm's."""
    kept = before + s.stream(s.shape.hidden)
    return {Category.ACTIVATIONS: kept, Category.RECOMPUTATION: s.stream(2 * s.shape.hidden) + _norm_backward(s)}


def _norm_backward(s: _Setting) -> int:
    """Three float32 copies of the stream; on a CPU a few rows of it."""
    return 3 * FLOAT * s.tokens * s.shape.hidden if s.cuda else 0


def _unpacked(s: _Setting, matrix: Matrix) -> Bytes:
    """A weight ready for a product, and the constants it is unpacked with."""
    if s.spec.quantization.type == "none":
        return {}
    size = matrix[0] * matrix[1]
    return {Category.DEQUANTIZATION: size * s.width}


def _mlp_backward(s: _Setting) -> Bytes:
    """silu, its input's gradient and the gate's; the normed input and its gradient; then a weight, or the norm's."""
    shape = s.shape
    live = s.stream(3 * shape.intermediate + 3 * shape.hidden) + s.adapter.layer_bytes(
        "gate_proj", "up_proj", "down_proj"
    )
    unpacked = _unpacked(s, (shape.intermediate, shape.hidden))
    norm = s.stream(shape.hidden) + _norm_backward(s)
    if norm > sum(unpacked.values()):
        return {Category.RECOMPUTATION: live + norm}
    return {Category.RECOMPUTATION: live, **unpacked}


def _attention_backward(s: _Setting) -> Bytes:
    """The gradients of queries, keys and values beside flash attention's own sums; the MLP's activations are gone."""
    shape = s.shape
    gone = s.stream(2 * shape.intermediate + shape.hidden + s.rank("gate_proj", "up_proj", "down_proj"))
    qkv = shape.queries + 2 * shape.keys
    live = s.stream(qkv + shape.queries + shape.hidden) + s.adapter.layer_bytes() - gone
    if not s.cuda:
        return {Category.RECOMPUTATION: live}
    sums = FLOAT * s.tokens * (shape.queries + shape.heads)
    expanded = 0 if shape.heads == shape.kv_heads else s.stream(2 * shape.queries)
    return {Category.RECOMPUTATION: live, Category.WORKSPACE: sums + expanded}
