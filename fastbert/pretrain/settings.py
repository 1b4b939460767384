"""The settings of a pretraining run, and what each of them may be."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from fastbert.data.batches import LONGEST, NEXT_WORD, Inputs, Objective
from fastbert.data.permutation import most_queries
from fastbert.data.tables import Quoting
from fastbert.data.tokenizer import LARGEST_VOCABULARY
from fastbert.data.words import Segmentation
from fastbert.models.auto import PRETRAINED
from fastbert.models.config import REACHES_OTHERS, WITH_RUNNING, AttentionKind, Norm
from fastbert.models.ernie import ErnieConfig
from fastbert.pretrain.phases import Phase, parse_phases, phase_ends
from fastbert.pretrain.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of a run; `fastbert pretrain --help` shows them."""

    output: Path
    """The run's folder; made by a new run, continued with --resume."""
    corpus: Path | None = None
    """A text file (one sentence or more per line, blank lines between documents), a table (CSV, TSV, JSON lines), or a
    folder of such."""
    store: Path | None = None
    """In place of --corpus: a token store of fastbert prepare, which has a tokenizer, and documents held out. It is
    read where it is, at once, however large it is; shards that are added later are for later runs."""
    column: str | None = None
    """The table's column, or the JSON objects' field, that holds the text; every row is a document."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double ("" for a quote within), backslash, none; auto looks at the header."""

    init: Path | None = None
    """A model folder, of this program or of transformers, that the run goes on from with its tokenizer: it decides what
    --model, --preset, --tokenizer, --vocab-size, --lowercase and --max-position-embeddings say otherwise."""
    add_words: Path | None = None
    """With --init: a text file with a word a line. Those that the tokenizer does not have are added to it and to the
    word embeddings, each as the mean of the pieces that it was read as."""
    rows_first: int = 0
    """With --add-words: so many steps at the start train the rows of the new words alone."""

    model: Literal["bert", "albert", "roberta", "ernie", "xlm-roberta", "xlnet", "elmo"] = "bert"
    """Architecture; xlm-roberta is RoBERTa in the folders of XLM-RoBERTa; elmo has LSTMs (docs/elmo.md)."""
    preset: Literal["tiny", "mini", "small", "base", "large", "xlarge", "xxlarge"] = "tiny"
    """Size of the model; below is what each costs, and which there are of each architecture."""
    tokenizer: Literal["wordpiece", "unigram", "bpe"] | None = None
    """Kind of the vocabulary that is trained on the corpus: BERT's, ALBERT's, or RoBERTa's (of bytes); if not given bpe
    for RoBERTa and wordpiece for the others."""
    vocab_size: int = 8192
    """Entries of the vocabulary."""
    lowercase: bool = True
    """Lower-case the text and strip accents, as uncased BERT does; RoBERTa as it was published does not."""
    max_position_embeddings: int = 512
    """Rows of the position table: the longest sequence the model will ever take. (RoBERTa's table has some rows more
    that no token takes; an XLNet has no table.)"""
    norm: Norm = "layer"
    """What normalises within the layers (docs/norms.md); transformers loads models with layer (LayerNorm) alone."""
    dropout: float | None = None
    """Probability of dropout, in hidden layers and in attention; if not given 0 for ALBERT and 0.1 for the others, and
    with --init the folder's."""

    attention_window: int | None = None
    """Let a token see this many others, an even number, half of them to each side, and the first token of its sequence,
    which sees all; if not given it sees all. transformers has no such model and cannot load it."""
    attention_kind: AttentionKind = "soft"
    """hard: a token takes the value of its best key alone, gumbel: of one drawn by its weight, each with the gradient
    of a softmax (docs/kernels.md). Both want --dropout 0, and transformers cannot load them."""
    attention_temperature: float | None = None
    """With --attention-kind hard or gumbel: temperature of the gradient's softmax, at first; if not given 1, and with
    --init the folder's."""
    attention_temperature_rate: float = 0.0
    """By which it falls: after n steps it is exp(-rate * n) of the first; 0 leaves it as it is. On a GPU --no-capture
    goes with it."""
    attention_temperature_end: float = 0.5
    """Below which it does not fall."""

    seq_len: int = 128
    """Longest sequence in tokens, [CLS] and [SEP] included."""
    phases: tuple[str, ...] | None = None
    """In place of --seq-len: lengths one after another, each with its share of the run, as 128:0.9 512:0.1 (BERT's)."""
    batch_tokens: int = 4096
    """Tokens of a batch; sequences are packed without padding."""
    static_shapes: bool = False
    """Give every batch the same shape, as CUDA graphs and compilers want it; less than a fiftieth of it is padding."""
    accumulate: int = 1
    """Batches whose gradients are added up for one step; several processes share them out (docs/pretraining.md)."""
    objective: Objective | None = None
    """What to train beside the masked language model (mlm): nothing, next-sentence prediction (nsp), sentence-order
    prediction (sop); if not given mlm for RoBERTa, which has no other, mlm+sop for ALBERT, mlm+nsp for the others. clm
    instead predicts every next token from those before it, and masks nothing; plm, XLNet's own and only one, a sixth of
    the tokens in a random order; bilm, ELMo's, every token from those before it and from those
    behind it."""
    sampled: int | None = None
    """Of an ELMo: train the softmax against so many sampled words in place of all; a step then moves their rows and
    those of the words that are predicted."""
    masking: Literal["token", "word", "ngram", "span"] = "token"
    """What is masked: tokens, each for itself, whole words, one to three words in a row, as ALBERT's, or one to ten, as
    SpanBERT's; with plm, what is predicted."""
    words: Segmentation | None = None
    """Where words are in Chinese text, for maskings of words: jieba finds them; or they stand apart in the corpus, by
    spaces, which are taken out."""
    dictionary: Path | None = None
    """A file of words or names, one a line, that are found in the text and count as one word each, for maskings of
    words: ERNIE's phrases and entities."""
    task_type: int | None = None
    """Of an ERNIE: the task that this run is, 0, 1 or 2, for a model with task types (ERNIE 2.0), which later runs on
    it (--init) give other numbers; if not given a new model has none."""
    inputs: Inputs = "doc-sentences"
    """Sequences of one document's sentences, as many as fit; or, for mlm and clm, of rows that go on into the next
    documents, each a sequence of its own (RoBERTa's names)."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation."""

    steps: int | None = None
    """Optimizer steps; with --minutes as well: at most so many."""
    minutes: float | None = None
    """Training time, which the learning rate then follows; the last evaluation comes after it. A run to be repeated
    bit for bit takes --steps alone."""
    lr: float | None = None
    """Highest learning rate; if not given the preset's, see below, and 1e-4 with --init."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up: linear, polynomial, cosine; wsd (warm-up, stable, decay) in the
    last share --decay alone; constant not at all."""
    warmup: float = 0.1
    """Share of the steps, or of the time, in which the learning rate rises."""
    decay: float = 0.2
    """With --schedule wsd: share in which the learning rate falls, as 1 - sqrt (Hägele et al., 2024)."""
    power: float = 1.0
    """With --schedule polynomial: what is left of the run, to this power; 1 is linear."""
    final_lr: float = 0.0
    """The learning rate at the end, as a share of the highest."""
    optimizer: Literal["lazy_adam", "lamb"] = "lazy_adam"
    """LazyAdam, or LAMB for batches of thousands of sequences (--accumulate); lamb needs the package pytorch_optimizer,
    and its --lr, if not given, is the paper's: 5e-3 for 32,768 sequences, and as the root of the batch."""
    weight_decay: float = 0.01
    """Decoupled; none on biases and LayerNorm."""
    beta2: float = 0.98
    """Decay of Adam's second moment; RoBERTa's value, BERT's own 0.999 learns more slowly in short runs."""
    clip: float = 1.0
    """Largest norm of the gradient that is applied."""
    embedding_update: Literal["touched", "all"] = "all"
    """Rows of the word embeddings that a step moves: all, or those whose word stands in its input or labels."""
    bf16: bool = False
    """Compute in bfloat16: on a CPU by autocast, on a GPU by a copy of the weights; weights stay float32."""
    capture: bool = True
    """On a GPU, where shapes are static, run the step as one CUDA graph; without, the same step is launched from
    Python, more slowly, with the same bits."""
    checkpoint_layers: bool = False
    """Keep each layer's input alone for the backward pass, which computes the layer again: less memory, more time, the
    same bits."""
    shard: bool = False
    """Split parameters, gradients and the optimizer's state over the processes (FSDP2): each keeps its part alone, so
    that a larger model fits, and more travels between them. On a GPU the step is not captured then."""
    linear: Literal["auto", "torch", "onednn", "widened", "fastbert"] = "auto"
    """Library of the products on a CPU; auto: the fastest one, timed once, when the run starts, and kept; near-ties go
    to the one that is usual for the processor."""
    seed: int = 0
    """Of everything random. The same corpus, settings and seed give the same weights, bit for bit, where what
    config.json names under "environment" is the same too, the library that --linear auto chose among it."""

    evaluations: int = 8
    """Evaluations on the held-out part, evenly over the run."""
    evaluation_batches: int = 32
    """Batches of one evaluation."""
    snapshot_every: int = 1000
    """Steps between snapshots, from which a run can be resumed; Ctrl-C and SIGTERM take one too."""
    keep: int = 2
    """Snapshots kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    workers: int = 0
    """Processes that prepare batches, of each training process; 0 prepares them there. The batches are the same."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    def check(self) -> None:
        """Raises ValueError with the rule, what came and what is expected, where a setting does not hold."""
        for name, kind in get_type_hints(PretrainConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                expect(value in get_args(kind), name, f"one of {', '.join(get_args(kind))}", value)
            elif any(get_origin(part) is Literal for part in get_args(kind)):  # or None
                choices = [choice for part in get_args(kind) for choice in get_args(part)]
                expect(value is None or value in choices, name, f"one of {', '.join(choices)}", value)
            elif kind in (bool, str):
                expect(type(value) is kind, name, "true or false" if kind is bool else "a string", value)
            elif kind == str | None:
                expect(value is None or type(value) is str, name, "a string", value)
            elif kind == Path | None:
                expect(value is None or isinstance(value, Path), name, "a path", value)
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            holds = type(value) is int and low <= value <= high
            expect(holds or (value is None and name in _OPTIONAL), name, f"an integer from {low} to {high}", value)
        for name, (rule, holds) in _NUMBERS.items():
            value = getattr(self, name)
            number = type(value) in (int, float) and holds(value)
            expect(number or (value is None and name in _OPTIONAL), name, rule, value)
        presets = PRETRAINED[self.model].config_class.presets
        expect(self.preset in presets, "preset", f"for model {self.model} one of {', '.join(presets)}", self.preset)
        if self.add_words is not None and self.init is None:
            raise ValueError("words are added to a folder's tokenizer: give --add-words with --init")
        if self.optimizer == "lamb":
            self._check_lamb()
        if self.rows_first and self.shard:
            raise ValueError("--rows-first trains one table, which --shard splits with all others: leave one out")
        if self.rows_first and self.add_words is None:
            raise ValueError("the rows to train first are those of new words: give --rows-first with --add-words")
        window = self.attention_window
        expect(window is None or window % 2 == 0, "attention_window", "even, half of it to each side", window)
        self._check_hard_attention()
        if self.task_type is not None and self.init is None:
            rule = "left out but for model ernie, which has task types"
            expect(self.model == "ernie", "task_type", rule, self.task_type)
        self._check_model()
        if self.steps is None and self.minutes is None:
            raise ValueError("a run ends after so many steps or minutes: give --steps, --minutes or both")
        self._check_elmo()
        self._check_schedule()
        self._check_lengths()
        objective = self.objective or OWN[self.model]["objective"]
        self._check_norm(objective)
        if objective in NEXT_WORD:
            expect(self.model != "albert", "objective", "one with mlm for model albert, which sees all words", "clm")
            expect(
                self.masking == "token",
                "masking",
                f"left out with objective {objective}, which masks nothing",
                self.masking,
            )
        for given, what in ((self.dictionary is not None, "a dictionary"), (self.words == "jieba", "--words jieba")):
            expect(not given or self.masking != "token", "masking", f"word, ngram or span with {what}", self.masking)
        if objective not in NEXT_WORD and self.inputs == "full-sentences":
            expect(objective == "mlm", "objective", "mlm or clm with inputs full-sentences, no pairs", objective)
        check_device(self.device)

    def _check_model(self) -> None:
        """What an encoder's architecture has not."""
        if self.model == "elmo":
            return
        kind = PRETRAINED[self.model]
        if OWN[self.model]["objective"] == "plm":
            rule = f"plm for model {self.model}, which predicts words in a random order alone"
            expect(self.objective in (None, "plm"), "objective", rule, self.objective)
            tables = ("max_position_embeddings",) if self.init is None else ()  # with it the folder's
            for name in ("norm", "attention_window", *tables):
                usual, value = getattr(PretrainConfig, name), getattr(self, name)
                expect(value == usual, name, f"left out for model {self.model}, which has no choice of it", value)
        elif kind.sentence_label is None:
            rule = f"mlm or clm for model {self.model}, which has no head for pairs of texts"
            expect(self.objective in (None, "mlm", "clm"), "objective", rule, self.objective)
        else:
            usual = [each for each in get_args(Objective) if each not in ("plm", "bilm")]
            rule = f"one of {', '.join(usual)} for model {self.model}"
            expect(self.objective in (None, *usual), "objective", rule, self.objective)

    def _check_norm(self, objective: str) -> None:
        rule = "layer or group with objective clm: statistics over tokens tell of those to be predicted"
        expect(objective != "clm" or self.norm not in REACHES_OTHERS, "norm", rule, self.norm)
        if self.norm in WITH_RUNNING:
            expect(self.model != "albert", "norm", "layer, instance or group for albert, whose layers share", self.norm)
            rule = f"left out with norm {self.norm}, which would count each batch twice in its running statistics"
            expect(not self.checkpoint_layers, "checkpoint_layers", rule, self.checkpoint_layers)
            rule = f"left out with norm {self.norm}, whose running statistics are one process's"
            expect(not self.shard, "shard", rule, self.shard)

    def _check_hard_attention(self) -> None:
        rate, first, last = self.attention_temperature_rate, self.attention_temperature, self.attention_temperature_end
        if self.attention_kind == "soft":
            rule = "left out with attention_kind soft, which has no temperature"
            expect(first is None, "attention_temperature", rule, first)
            return expect(rate == 0, "attention_temperature_rate", rule, rate)
        own = 0.0 if self.init is not None else OWN[self.model]["dropout"]  # a folder's fits its attention
        dropout = own if self.dropout is None else self.dropout
        rule = f"0 (--dropout 0) with attention_kind {self.attention_kind}, which has no weights to drop"
        expect(dropout == 0, "dropout", rule, dropout)
        if rate > 0:
            rule = "at most attention_temperature, from which it falls"
            expect(last <= (1.0 if first is None else first), "attention_temperature_end", rule, last)
            rule = "false (--no-capture) with attention_temperature_rate: a CUDA graph keeps one temperature"
            on_gpu = torch.device(self.device).type == "cuda"
            expect(not on_gpu or self.shard or not self.capture, "capture", rule, self.capture)

    def _check_elmo(self) -> None:
        """What is an ELMo's alone, and what it has not."""
        if self.model != "elmo":
            expect(self.sampled is None, "sampled", "left out but for model elmo", self.sampled)
            return
        expect(self.objective in (None, "bilm"), "objective", "bilm for model elmo", self.objective)
        usual = PretrainConfig
        of_encoders = "norm", "attention_window", "attention_kind", "checkpoint_layers", "shard"
        for name in ("masking", "words", "dictionary", *of_encoders):
            rule = "left out with model elmo, which has nothing of the kind"
            expect(getattr(self, name) == getattr(usual, name), name, rule, getattr(self, name))
        rule = "left out with model elmo, whose words are in two tables"
        expect(self.add_words is None, "add_words", rule, self.add_words)
        expect(torch.device(self.device).type == "cpu", "device", "cpu for model elmo: no GPU has run it", self.device)
        expect(not self.bf16, "bf16", "left out with model elmo, whose LSTMs are computed in float32", self.bf16)
        rule = "lazy_adam with sampled, whose gradients are sparse"
        expect(self.sampled is None or self.optimizer == "lazy_adam", "optimizer", rule, self.optimizer)

    def _check_schedule(self) -> None:
        default = PretrainConfig
        only = (
            ("power", self.schedule == "polynomial", "polynomial"),
            ("decay", self.schedule == "wsd", "wsd"),
            ("final_lr", self.schedule != "constant", "other than constant"),
        )
        for name, used, schedule in only:
            value = getattr(self, name)
            expect(used or value == getattr(default, name), name, f"left out unless schedule is {schedule}", value)
        if self.schedule == "wsd":
            rule = f"at most what warmup={self.warmup:g} leaves"
            expect(self.warmup + self.decay <= 1, "decay", rule, self.decay)

    def _check_lamb(self) -> None:
        rule = "all with optimizer lamb, which scales a step by the norm of the whole table"
        expect(self.embedding_update == "all", "embedding_update", rule, self.embedding_update)
        expect(self.rows_first == 0, "rows_first", "left out with optimizer lamb, likewise", self.rows_first)
        rule = "left out with optimizer lamb, which needs the norms of whole tables"
        expect(not self.shard, "shard", rule, self.shard)
        on_gpu = torch.device(self.device).type == "cuda"
        rule = "false (--no-capture) with optimizer lamb, which counts its steps in Python, unseen by a CUDA graph"
        expect(not (on_gpu and self.capture), "capture", rule, self.capture)

    def _check_lengths(self) -> None:
        """What `seq_len`, or the phases in its place, must hold to."""
        if self.phases is not None:
            expect(self.seq_len == PretrainConfig.seq_len, "seq_len", "left out with phases", self.seq_len)
            if self.steps is not None:
                bounds = [0, *phase_ends(parse_phases(self.phases), self.steps)]
                rule = f"of a step each or more, of steps={self.steps}"
                expect(all(a < b for a, b in itertools.pairwise(bounds)), "phases", rule, " ".join(self.phases))
        low, high = _INTEGERS["seq_len"]
        given = "seq_len" if self.phases is None else "phases"
        for length, _ in self.all_phases():
            if self.phases is not None:
                expect(low <= length <= high, "phases", f"of lengths from {low} to {high}", length)
            if self.model == "elmo" or PRETRAINED[self.model].config_class.has_position_table:
                rule = f"at most the rows of the position table, max_position_embeddings={self.max_position_embeddings}"
                expect(length <= self.max_position_embeddings, given, rule, length)
            queries = most_queries(length) if OWN[self.model]["objective"] == "plm" else 0
            rule = f"at least one sample's, of {length} tokens{f' and {queries} queries' if queries else ''}"
            expect(self.batch_tokens >= length + queries, "batch_tokens", rule, self.batch_tokens)

    def all_phases(self) -> list[Phase]:
        """The run's phases; without --phases it is one."""
        return [Phase(self.seq_len, 1.0)] if self.phases is None else parse_phases(self.phases)


# What each architecture was published with.
OWN = {
    "bert": {"objective": "mlm+nsp", "dropout": 0.1, "tokenizer": "wordpiece"},
    "albert": {"objective": "mlm+sop", "dropout": 0.0, "tokenizer": "wordpiece"},
    "roberta": {"objective": "mlm", "dropout": 0.1, "tokenizer": "bpe"},
    "xlm-roberta": {"objective": "mlm", "dropout": 0.1, "tokenizer": "bpe"},
    "ernie": {"objective": "mlm+nsp", "dropout": 0.1, "tokenizer": "wordpiece"},
    "xlnet": {"objective": "plm", "dropout": 0.1, "tokenizer": "wordpiece"},
    "elmo": {"objective": "bilm", "dropout": 0.1, "tokenizer": "wordpiece"},
}

# Continued pretraining's usual rate: Gururangan et al., "Don't stop pretraining" (2020).
CONTINUED_LR = 1e-4

_OPTIONAL = (
    "steps", "minutes", "lr", "dropout", "task_type", "attention_window", "attention_temperature", "sampled",
)  # fmt: skip
_MANY = 2**31 - 1  # the largest int32
_INTEGERS = {  # setting: lowest and highest value
    "vocab_size": (64, LARGEST_VOCABULARY),
    "max_position_embeddings": (8, LONGEST),
    "attention_window": (0, LONGEST),
    "seq_len": (8, LONGEST),
    "batch_tokens": (8, 2**30),  # places in a packed batch are int32, and batches are rounded up
    "accumulate": (1, _MANY),
    "steps": (1, _MANY),
    "sampled": (1, LARGEST_VOCABULARY // 2),
    "rows_first": (0, _MANY),
    "task_type": (0, ErnieConfig.task_type_vocab_size - 1),
    "seed": (0, 2**64 - 1),
    "evaluations": (1, 10**6),
    "evaluation_batches": (1, _MANY),
    "snapshot_every": (1, _MANY),
    "keep": (1, _MANY),
    "log_every": (1, _MANY),
    "workers": (0, 1024),
}
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {  # setting: the rule, and whether a number keeps it
    "dropout": ("a probability from 0 to below 1", lambda x: 0 <= x < 1),
    "attention_temperature": ("a number above 0", lambda x: 0 < x < math.inf),
    "attention_temperature_rate": ("a number of at least 0", lambda x: 0 <= x < math.inf),
    "attention_temperature_end": ("a number above 0", lambda x: 0 < x < math.inf),
    "held_out": ("a share above 0 and at most 0.5", lambda x: 0 < x <= 0.5),
    "minutes": (f"above 0 and at most {60 * 24 * 366}, a year", lambda x: 0 < x <= 60 * 24 * 366),
    "lr": ("a number above 0", lambda x: 0 < x < math.inf),
    "warmup": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "decay": ("a share above 0 and at most 1", lambda x: 0 < x <= 1),
    "power": ("a number above 0", lambda x: 0 < x < math.inf),
    "final_lr": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "weight_decay": ("a number of at least 0", lambda x: 0 <= x < math.inf),
    "beta2": ("a number from 0 to below 1", lambda x: 0 <= x < 1),
    "clip": ("a number above 0, 1e9 for gradients as they are", lambda x: 0 < x < math.inf),
}


def check_device(device: str) -> None:
    """Raises ValueError unless torch has the device here, and it is one that a run can train on."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error
    expect(torch.device(device).type in ("cpu", "cuda"), "device", "cpu or cuda (or cuda:1, ...)", device)


def expect(holds: bool, name: str, rule: str, value: object) -> None:
    """Raises ValueError, which says the setting's name, its rule and what came, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
