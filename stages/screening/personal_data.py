"""What tells of a person: addresses and numbers that reach, pay or identify one. Those kept for examples are none."""

import ipaddress
import re
from collections.abc import Callable

from stages.screening.spots import Spot, apart

ROLES = {"abuse", "admin", "billing", "contact", "feedback", "hello", "help", "info", "legal", "noreply", "no-reply", "office", "postmaster",
         "press", "privacy", "sales", "security", "support", "team", "webmaster", "git", "user", "username"}  # fmt: skip
NO_MAIL = re.compile(
    r"(?:^|\.)(?:example(?:\.\w+)?|test|invalid|localhost|local|noreply\.github\.com|png|jpe?g|gif|svg|webp|py|js|ts|json|ya?ml)$"
)
RESOLVERS = {"1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9"}
HAS_ONE = re.compile(r"@|\d[\d ().:/-]{5}|[0-9a-f]:[0-9a-f:]{3}|[A-Z]{2}\d\d", re.IGNORECASE)


def is_mailbox(address: str) -> bool:
    """Whether it is a person's, not a role's, an example's or a file's."""
    name, _, domain = address.lower().rpartition("@")
    return name not in ROLES and not NO_MAIL.search(domain)


def is_card(number: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1, annex B), of digits that are not all the same."""
    digits = [int(digit) for digit in re.sub(r"\D", "", number)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(number: str) -> bool:
    """The check of ISO 13616: the number with its first four characters last, letters as 10 to 35, leaves 1 modulo 97."""
    packed = number.replace(" ", "")
    return 15 <= len(packed) <= 34 and int("".join(str(int(one, 36)) for one in packed[4:] + packed[:4])) % 97 == 1


def is_reachable(address: str) -> bool:
    """Whether it is an address in the public net. Four numbers below 20 are rather a version."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_version = parsed.version == 4 and max(parsed.packed) < 20
    return parsed.is_global and not parsed.is_multicast and not is_version and address not in RESOLVERS


def is_number(phone: str) -> bool:
    """Whether it has as many digits as an international number (ITU-T E.164)."""
    return 8 <= len(re.sub(r"\D", "", phone)) <= 15


def always(_found: str) -> bool:
    return True


PATTERNS: list[tuple[str, re.Pattern[str], Callable[[str], bool]]] = [
    # not in an address (ssh://me@host) or before a path (me@host:path)
    ("Email", re.compile(r"(?<![\w.+%/@-])[\w+%][\w.+%-]*@(?:[a-zA-Z0-9-]+\.)+[a-zA-Z]{2,}\b(?!:[\w/~.])(?!\.?[\w@-])"), is_mailbox),
    ("Credit Card", re.compile(r"(?<![\w.,+-])(?<!\d )(?:[2-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d[ -]?\d{6}[ -]?\d{5})(?![\w-]|[., ]\d)"), is_card),
    ("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), is_iban),
    ("Social Security Number", re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)"), always),
    # +49 30 1234567 or +14155552671; (415) 555-2671 but not 555-0100 to 555-0199, which are kept for fiction; Tel. 030 1234567
    ("Phone Number", re.compile(r"(?<![\w+./-])\+[1-9]\d{0,2}(?:[ .()-]{0,2}\d{1,6}){2,6}(?![\w-]|\.\d)"), is_number),
    ("Phone Number", re.compile(r"(?<![\w.+-])(?:1[-. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])(?!555.01)[2-9]\d\d[-. ]\d{4}(?![\w-]|\.\d)"), always),
    ("Phone Number", re.compile(r"(?i:\b(?:tel|phone|mobile|cell|fax|call)(?:ephone)?(?: (?:number|no\.?))?[.:]*[ \t]*(?:is )?)(?P<it>\b0\d(?:[ /-]?\d){6,11})(?!\w)"), always),
    ("IP Address", re.compile(r"(?<![\w.=-])(?<!ersion )(?:\d{1,3}\.){3}\d{1,3}(?![\w/-]|\.\w)"), is_reachable),
    ("IP Address", re.compile(r"(?<![\w:.])[23][0-9a-f]{3}:(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{1,4}(?![\w:/])", re.IGNORECASE), is_reachable),
]  # fmt: skip


def personal_data_in(text: str) -> list[Spot]:
    """Where personal data stand in `text`, in its order, none overlapping."""
    if not HAS_ONE.search(text):
        return []
    return apart(
        Spot(rule, *found.span("it" if "it" in pattern.groupindex else 0))
        for rule, pattern, is_one in PATTERNS
        for found in pattern.finditer(text)
        if is_one(found[0])
    )
