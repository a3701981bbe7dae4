"""Passwords, keys and tokens: detect-secrets' patterns of tokens with a form of their own, and ours for what it lacks."""

import functools
import re
from importlib import import_module

from stages.screening.spots import Spot, apart

# The detectors of detect-secrets whose tokens have a form of their own. Left out: entropy, to which every hash and id is a secret;
# keywords, to which the word after "password:" is one; passwords in addresses, to which placeholders are; private keys, of which it
# marks the first line; Artifactory, to which APACHE2LICENSE is one; and IBM's four, whose forms are those of an assignment below.
PLUGINS = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
TOKENS = {
    "Private Key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?:(?!-----).){0,300}?[A-Za-z0-9+/]{32}"
    r"(?:(?:(?!-----).)*-----END [A-Z0-9 ]+-----|[A-Za-z0-9+/=\s]*)",
    "GitHub Token": r"\bgithub_pat_\w{22,}",
    "Slack Token": r"\b(?:xapp|xox[a-z])-(?:\w+-)+\w{8,}",
    "Stripe Access Key": r"\b(?:[rs]k_(?:live|test)_|whsec_)[0-9a-zA-Z]{16,}",
    "OpenAI Token": r"\bsk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,})",
    "Hugging Face Token": r"\bhf_[A-Za-z0-9]{30,}",
    "Google API Key": r"\bAIza[\w-]{35}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{20,}",
    "NPM Token": r"\bnpm_[A-Za-z0-9]{36}",
    "Docker Token": r"\bdckr_[op]at_[\w-]{20,}",
    "DigitalOcean Token": r"\bdo[opr]_v1_[a-f0-9]{64}",
    "Databricks Token": r"\bdapi[a-f0-9]{32}",
    "Vault Token": r"\bhv[sbr]\.[\w-]{20,}",
    "Azure Signature": r"[?&]sig=[\w%+/=]{30,}",
}
VALUE = r"""["'`]?(?P<secret>[^\s"'`,;|<>]{6,})"""
PASSWORD = r"(?:pass(?:word|wd|phrase|code)|pwd|(?<=_)pass)"
KEY = (
    r"(?:secret|token|connection_?string"
    r"|(?:secret|api|access|auth|account|private|encryption|signing|master|storage)[ _-]?key(?:_secret)?)"
)
SEPARATED = rf"""s?_?\d*["'`*\]]{{0,3}}(?:[ \t]*(?:=>|:=|==?|:|>(?=\S)|\bis\b:?)[ \t*]*@?|[ \t]+(?=["'`]|\S{{16}})){VALUE}"""
ASSIGNED = [  # told by what stands before them, so that the value has to look made as well
    ("Authorization Header", r"\bauthorization[\"']?\s*[:=]\s*[\"'`]?(?:bearer|basic|token|apikey)\s+(?P<secret>[\w.~+/=-]{8,})"),
    ("Authorization Header", r"\bbearer\s+(?P<secret>[\w.~+/=-]{20,})"),
    ("Password In Address", r"\b[a-z][a-z0-9+.-]*://[^\s:/@'\"<>]*:(?P<secret>[^\s/@'\"<>]{3,})@(?!sha256:)[\w.\[-]"),
    ("Password", PASSWORD + SEPARATED),
    ("Password", rf"--?[\w-]*{PASSWORD}[ \t]+{VALUE}"),
    ("Password", r"(?:[ \t]-u|--user)[ =][\"']?[\w.@-]+:(?P<secret>[^\s\"':]{6,})"),
    ("Secret Key", KEY + SEPARATED),
    ("Secret Key", rf"--?[\w-]*{KEY}[ \t]+{VALUE}"),
]  # fmt: skip
# What some pattern needs, in lower case: a text without any of it is done within microseconds.
NEEDED = (
    "passw", "passp", "passc", "_pass", "pwd", "secret", "token", "key", "connection", "authorization", "bearer", "://", "--user", " -u ",
    "akia", "asia", "abia", "acca", "a3t", "aws", "eyj", "sk-", "k_live_", "k_test_", "whsec_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_",
    "glpat", "gldt", "glft", "glsoat", "glrt", "gr1348941", "glcbt", "glimt", "glptt", "glagent", "gloas", "xox", "xapp-", "hf_", "aiza", "gocspx",
    "ya29.", "npm_", "-us", "pypi-", "sg.", "sq0csp", "dckr_", "_v1_", "dapi", "hvs.", "hvb.", "hvr.", "sig=",
)  # fmt: skip
WITHOUT_PREFIX = re.compile(
    r"[MNO][\w-]{23,25}\.[\w-]{6}\.|\d{8,10}:[\w-]{35}|(?:AC|SK)[a-z0-9]{32}"
)  # Discord, Telegram, Twilio
REST_OF_TOKEN = re.compile(r"(?:[\w=-]|\.(?=\w))*")  # detect-secrets' patterns stop at a token's usual length
PLACEHOLDER = re.compile(
    r"example|placeholder|change[-_ ]?(?:me|it|this)|redacted|removed|dummy|x{5}|\*{3}|\.{3}|…|^[<$%{@\[(*]|\$\{|\{\{|%\(|\byour[-_ ]?",
    re.IGNORECASE,
)
WORDS_OF_PLACEHOLDERS = re.compile(
    r"(?:your|my|the|an?|some|this|is|not|new|old|user(?:name)?|admin|test|sample|fake|mock|demo|secret|pass(?:word|wd|phrase)?|pwd|keys?"
    r"|token|api|access|auth|client|id|account|here|value|string|insert|enter|put|goes|foo|bar|baz|super|true|false|none|null|required"
    r"|optional|root|guest|abc(?:def)?|xyz|[\W_\d])+",
    re.IGNORECASE,
)
REFERENCE = re.compile(  # to a variable, a call, a file or an address
    r"[A-Za-z_][\w.]*[\[({].*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|(?:~|\.{0,2})/.*|\w+://.*"
    r"|.*\.(?:json|ya?ml|pem|txt|key|env|md|py|html?)"
)
SLUG = re.compile(r"[a-z]+(?:[-_.][a-z]+)*[-_.]?v?\d{1,4}(?:\.\d+)*", re.IGNORECASE)  # a name, as in `secret: db-login-2`


@functools.cache
def patterns() -> tuple[list[tuple[str, re.Pattern[str]]], list[tuple[str, re.Pattern[str]]]]:
    """Rules and patterns, of tokens and of assignments."""
    # its patterns, not its scan: that gives no offsets, and of GitHub's and GitLab's tokens the prefix only
    library = [getattr(import_module(f"detect_secrets.plugins.{module}"), name) for module, name in PLUGINS.items()]
    tokens = [(detector.secret_type, pattern) for detector in library for pattern in detector.denylist]
    tokens += [(rule, re.compile(pattern, re.DOTALL)) for rule, pattern in TOKENS.items()]
    return tokens, [(rule, re.compile(pattern, re.IGNORECASE)) for rule, pattern in ASSIGNED]


def secrets_in(text: str) -> list[Spot]:
    """Where secrets stand in `text`, in its order, none overlapping. Placeholders (`<your-key>`, `${TOKEN}`, `changeme`) are none."""
    folded = text.lower()
    if not any(needed in folded for needed in NEEDED) and not WITHOUT_PREFIX.search(text):
        return []
    tokens, assignments = patterns()
    spots = []
    for rule, pattern in tokens:
        for found in pattern.finditer(text):
            rest = REST_OF_TOKEN.match(text, found.end())
            if len(set(found[0])) >= 8 and not PLACEHOLDER.search(found[0]):
                spots.append(Spot(rule, found.start(), rest.end() if rest else found.end()))
    for rule, pattern in assignments:
        spots += [Spot(rule, *found.span("secret")) for found in pattern.finditer(text) if is_made(found["secret"], rule)]
    return apart(spots)


def is_made(value: str, rule: str) -> bool:
    """Whether somebody made `value` up as a secret: no placeholder, no reference and no name."""
    if PLACEHOLDER.search(value) or WORDS_OF_PLACEHOLDERS.fullmatch(value) or REFERENCE.fullmatch(value):
        return False
    if rule == "Password In Address":
        return True
    return bool(re.search("[A-Za-z]", value) and re.search(r"[\d!@#$%^&*+=?~]", value)) and not (
        rule == "Secret Key" and SLUG.fullmatch(value)
    )
