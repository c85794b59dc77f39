"""The model: loads a checkpoint, and generates text with it.

  Generator           generates text: `Generator.load("smollm2").generate("Hello")`
  Conversation        a chat with a generator, whose KV cache is kept from turn to turn
  Sampling            how tokens are chosen: temperature, filters, penalties, biases
  Generation          the continuation of a prompt
  Statistics          times of a run, beside the bytes that its steps had to read
  load_checkpoint     reads config, weights and tokenizer of a checkpoint as a `Checkpoint`
  Tokenizer           converts text to tokens and back, and renders chats
  CheckpointError     what is wrong with a checkpoint, and what to do

The command `palladion` does the same from a shell.
"""

from palladion.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from palladion.model.conversation import Conversation
from palladion.model.generation import Generation
from palladion.model.generator import Generator
from palladion.model.sampling import Sampling
from palladion.model.statistics import Statistics
from palladion.model.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversation",
    "Generation",
    "Generator",
    "Sampling",
    "Statistics",
    "Tokenizer",
    "load_checkpoint",
]
