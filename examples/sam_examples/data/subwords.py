"""Subwords: the pieces that sentences are cut into, learnt by SentencePiece."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from sam_examples.data.token_batches import Sequences

PAD, UNKNOWN, BEGIN, END = range(4)


class Subwords:
    """Cuts sentences into subwords and joins them again.

    Attributes:
      proto: the model of SentencePiece, as bytes.
    """

    def __init__(self, proto: bytes) -> None:
        """Reads a model.

        Raises:
          ValueError: if it is none, or its special tokens are others.
        """
        self.proto = proto
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError("the subwords are no model of SentencePiece.") from error

    def __len__(self) -> int:
        """How many there are, the special ones included."""
        size: int = self._processor.get_piece_size()
        return size

    def encode(self, sentences: Sequence[str]) -> Sequences:
        """Cuts sentences, and ends each with the token of the end."""
        pieces = self._processor.encode(list(sentences), add_eos=True)
        return Sequences.of([np.asarray(tokens, np.int32) for tokens in pieces])

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Joins tokens `[N, length]`, each up to that of its end."""
        rows = [row[: (*row, END).index(END)] for row in tokens.tolist()]
        sentences: list[str] = self._processor.decode(rows)
        return sentences


def learn_subwords(sentences: Sequence[str], size: int) -> Subwords:
    """Learns subwords by merging pairs (byte-pair encoding).

    Args:
      sentences: those of both languages together.
      size: how many subwords to learn, the four special ones included; fewer where the
        sentences have no more.

    Raises:
      ValueError: if the size is too small for the characters of the sentences.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            # A translation is to have the characters of the text as they are.
            normalization_rule_name="identity",
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--vocabulary {size} is too small for the characters of the training text "
            f"({error})"
        ) from error
    return Subwords(model.getvalue())


def load_subwords(path: Path) -> Subwords:
    """Reads the subwords that an earlier run has kept.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is no model of SentencePiece.
    """
    try:
        return Subwords(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
