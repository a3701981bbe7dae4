"""Sentences that speak to a model instead of a reader: what poisoned documentation is made of."""

import re

from stages.screening.spots import Spot, apart

MODEL = r"(?:AI|LLM|(?:large )?language model|chat ?bot|AI (?:assistant|agent|model|system)|assistant model)s?"
PATTERNS = {
    "Ignore Instructions": r"\b(?:ignore|disregard|forget|override|bypass|do not follow|don't follow|stop following)\s+"
    r"(?:(?:all|any|every|each|everything|of|the|your|these|those|its|my|other|in)\s+){0,4}"
    r"(?:(?:previous|prior|preceding|earlier|above|foregoing|existing|original|initial|system|safety|past|former)[\s,]+(?:and\s+)?){1,3}"
    r"(?:\w+\s+)?(?:instruct\w+|prompts?|rules|guidelines|directions|directives|orders|commands|context|training|programming)\b"
    r"|\b(?:disregard|forget|ignore)\s+(?:all\s+)?(?:(?:of\s+)?your\s+(?:instruct\w+|prompts?|rules|guidelines|training|programming)"
    r"|(?:everything|all|anything)\s+(?:above|before\s+this|you\s+(?:were|have\s+been|know|\w+\s+told))"
    r"|the\s+above(?=\s+and\s|\s*[.,:;!]|\s*$))",
    "Role Change": r"\byou\s+are\s+now\s+(?:(?:a|an|the|my|called|named|acting\s+as)\s+(?:[\w-]+\s+){0,4}?(?:AI|assistant|bot|chatbot|model|agent|persona|hacker|pirate|character)\b"
    r"|(?:unrestricted|jailbroken|unfiltered|free\s+(?:of|from)|no\s+longer\s+(?:bound|restricted|an?)|in\s+\w+\s+mode|(?-i:DAN|[A-Z]\w*(?:Bot|GPT)))\b)"
    r"|\bfrom\s+now\s+on,?\s+(?:you|your\s+\w+)\s+(?:are|will|must|should|shall|only|always|never)\b"
    r"|\b(?:pretend|act\s+as\s+if)\s+(?:that\s+)?(?:to\s+be\s+(?:an?\s+)?(?:\w+\s+){0,2}?(?:AI|assistant|model|bot)|you\s+(?:are|have)\s+(?:an?\s+)?(?:\w+\s+){0,3}?(?:AI|assistant|model|bot|no\s+(?:rules|restrictions|limits|filters)))\b"
    r"|\b(?:enable|enter|activate)\s+(?:developer|jailbreak|DAN|god)\s+mode\b",
    "System Prompt": r"(?:^|\n)[ \t>*#_`\"'\[(]*(?:new|updated|real|actual|important)?[ \t]*system[ \t]+(?:prompt|message|instructions?|override)[*_`]*[ \t]*[:\]]"
    r"|\b(?:reveal|repeat|leak|print|output|show|display|tell\s+me)\s+(?:me\s+)?(?:all\s+of\s+)?(?:your|the\s+(?:hidden|secret))\s+(?:\w+\s+)?(?:system\s+)?(?:prompts?|instructions)\b",
    "Secrecy": r"\b(?:do\s+not|don't|never|must\s+not|without)\s+(?:tell|telling|inform|informing|reveal|revealing|disclose|disclosing|mention|mentioning|alert|alerting|warn|warning)\s+"
    r"(?:(?:this|that|it|any\s+of\s+(?:this|it)|these\s+instructions)\s+)?(?:to\s+)?(?:the\s+|any\s+|your\s+)?(?:users?|readers?|humans?|operators?)\b",
    "Addresses A Model": rf"\bas\s+an?\s+{MODEL}(?:\s+assistant)?,?\s+(?:you|your\s+\w+)\s+(?:must|should|will|shall|are|have|need|may|can)\b"
    rf"|\b(?:notes?|attention|messages?|instructions?|important)\s*(?:to|for|[:,])\s+(?:(?:all|any|the|every)\s+)?{MODEL}\b(?!\s+(?:training|providers?))"
    rf"|\bif\s+you\s+are\s+an?\s+{MODEL}\b"
    rf"|\b{MODEL}\s+(?:reading|processing|summari[sz]ing|answering)\s+(?:this|these)\b",
    "Chat Template": r"<\|(?:im_start|im_end|im_sep|system|user|assistant|end|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag)\|>"
    r"|\[/?INST\]|<</?SYS>>|</?start_of_turn>|<end_of_turn>|^#{3} (?:Instruction|System|Human|Assistant|Response):?$",
}  # fmt: skip
COMPILED = {rule: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for rule, pattern in PATTERNS.items()}
NEEDED = (
    "ignore", "disregard", "forget", "override", "bypass", "follow", "you are now", "you\nare", "from now", "pretend", "act as", " mode", "system",
    "prompt", "instruct", "tell", "inform", "reveal", "disclos", "mention", "alert", "warn", "ai", "llm", "language model", "chatbot", "chat bot",
    "<|", "inst]", "sys>>", "_of_turn>", "### ",
)  # fmt: skip
CODE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1|\Z)|(?<!`)(`+)(?!`)[^\n]+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)


def instructions_in(text: str) -> list[Spot]:
    """Where `text` speaks to a model, in its order, none overlapping.

    Marks of chat templates count outside code only, as documentation shows them there; a sentence counts wherever it stands.
    """
    folded = text.lower()
    if not any(needed in folded for needed in NEEDED):
        return []
    code = [found.span() for found in CODE.finditer(text)] if COMPILED["Chat Template"].search(text) else []
    spots = [Spot(rule, *found.span()) for rule, pattern in COMPILED.items() for found in pattern.finditer(text)]
    return apart(
        spot for spot in spots if spot.rule != "Chat Template" or not any(start <= spot.start < end for start, end in code)
    )
