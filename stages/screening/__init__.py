"""What a text should not carry into a model: secrets, personal data, and instructions that are meant for the model."""

from stages.screening.instructions import instructions_in
from stages.screening.personal_data import personal_data_in
from stages.screening.secrets import secrets_in
from stages.screening.spots import Spot, mark, redacted

__all__ = ["Spot", "instructions_in", "mark", "personal_data_in", "redacted", "secrets_in"]
