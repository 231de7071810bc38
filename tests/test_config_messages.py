"""What is said about a wrong configuration file: a row for each message."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Config, load, parse
from proxy.errors import ConfigError

FILE = "config.toml"
OFFICE_KEY = "office-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
OTHER_OFFICE_KEY = "office-1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
A = '[[upstream]]\nname = "a"\nurl = "https://a.example"\n'
B = '[[upstream]]\nname = "b"\nurl = "https://b.example"\n'


def refusal(text: str, **environ: str) -> ConfigError:
    """Return the error that a file of somebody at home in /home/me raises."""
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE, environ={"HOME": "/home/me", **environ})
    return caught.value


WRONG_TOML = [
    ("server", "1: not TOML: Expected '=' after a key in a key/value pair, at the end"),
    ("[log]\nlevel = \n\n", "2: not TOML: Invalid value, column 9"),
    ("[log]\n\n[log]\n", "3: not TOML: Cannot declare ('log',) twice, column 5"),
    ("[log]\n\n[server]\npriority = [\n\n", "4: not TOML: Invalid value, at the end"),
]
UNKNOWN = [
    ("[trust]\nkeys = ['k']\nkey = 1", '3: trust.key: unknown key; did you mean "keys"?'),
    ("[server]\npriority = 1\nlisen = []", '3: server.lisen: unknown key; did you mean "listen"?'),
    ("[log]\nlevel = 'info'\n[store]\npth = ''", '4: store.pth: unknown key; did you mean "path"?'),
    ("\n[servr]\n", '2: servr: unknown table; did you mean "server"?'),
    ("\n[[upstreams]]\n", '2: upstreams: unknown table; did you mean "upstream"?'),
    ("listen = []", "1: listen: unknown key"),
    (f"{A}\n{B}prority = 1", '8: upstream[1].prority: unknown key; did you mean "priority"?'),
    (
        f'{A}[upstream.auth]\nbeerer = ""',
        '5: upstream[0].auth.beerer: unknown key; did you mean "bearer"?',
    ),
    (
        'upstream = [\n  { name = "a", url = "https://a", kees = [] },\n]',
        '2: upstream[0].kees: unknown key; did you mean "keys"?',
    ),
    ('[server]\n"a` - at `$.log" = 1', '2: server."a` - at `$.log": unknown key'),
    ('"a` - at `$.log.level" = 1', '1: "a` - at `$.log.level": unknown key'),
    ('[log]\n"a\\nb.c" = 1', r'2: log."a\nb.c": unknown key'),
]
MISSING = [
    (
        '[log]\n[[upstream]]\nurl = "https://a"',
        "2: upstream[0].name: is missing, and has no default",
    ),
    (
        f'{A}\n[[upstream]]\n\nname = "b"',
        "5: upstream[1].url: is missing, and has no default",
    ),
    (
        'upstream = [\n{ url = "https://a" }]',
        "2: upstream[0].name: is missing, and has no default",
    ),
]
WRONG_TYPE = [
    ("[server]\nlisten = 'a:1'", "2: server.listen: expected an array, not a string"),
    (
        "[server]\nlisten = [\n'a:1',\n1]",
        "4: server.listen[1]: expected a string, not a whole number",
    ),
    (
        "[server]\npriority = true",
        "2: server.priority: expected a whole number, not true or false",
    ),
    (
        "[server]\npriority = 1.0",
        "2: server.priority: expected a whole number, not a number with a fraction",
    ),
    ("[server]\npriority = 1979-05-27", "2: server.priority: expected a whole number, not a date"),
    (
        "[server]\nworkers = true",
        "2: server.workers: expected a whole number or a string, not true or false",
    ),
    ("prefetch.narinfos = 1", "1: prefetch.narinfos: expected true or false, not a whole number"),
    ("[log]\nlevel = 1", "2: log.level: expected a string, not a whole number"),
    ("\n[[server]]", "2: server: expected a table, [server], not an array"),
    ("log = 07:32:00", "1: log: expected a table, [log], not a time"),
    (
        "\n[upstream]",
        "2: upstream: expected an array of tables, [[upstream]], not a table",
    ),
    ("upstream = [1]", "1: upstream[0]: expected a table, not a whole number"),
    (
        f"{A}auth = 1979-05-27 07:32:00",
        "4: upstream[0].auth: expected a table, not a date and time",
    ),
    (f"{A}keys = 'k'", "4: upstream[0].keys: expected an array, not a string"),
]
WRONG_GLOBS = [
    (
        f"{A}allow = []",
        "4: upstream[0].allow: allows nothing; without this key every name is allowed",
    ),
    (f'{A}deny = ["a", ""]', "4: upstream[0].deny[1]: is empty: no store path has such a name"),
    (
        f'{A}deny = ["/nix/store/*"]',
        (
            "4: upstream[0].deny[0]: matches no store path: a name, as in "
            '"hello-2.12", has only letters, digits and "+-._?="'
        ),
    ),
    (f'{A}allow = ["a-[bc"]', '4: upstream[0].allow[0]: has a "[" without "]"'),
    (f'{A}allow = "a"', "4: upstream[0].allow: expected an array, not a string"),
]
NO_ALTERNATIVE = [
    (
        '[log]\nlevel = "dbug"',
        '2: log.level: "dbug" is not "debug", "info", "warning" or "error"; did you mean "debug"?',
    ),
    ('[log]\nformat = "xml"', '2: log.format: "xml" is not "auto", "console" or "json"'),
    (
        '[policy]\nmode = "ofline"',
        ('2: policy.mode: "ofline" is not "auto", "offline" or "strict"; did you mean "offline"?'),
    ),
    (
        '[policy]\nupstream_down = "notfound"',
        (
            '2: policy.upstream_down: "notfound" is not "not-found" or "error"; '
            'did you mean "not-found"?'
        ),
    ),
    ('[prefetch]\nnars = ""', '2: prefetch.nars: "" is not "off" or "wanted"'),
    (
        f'{A}trust = "sign"',
        '4: upstream[0].trust: "sign" is not "signed" or "none"; did you mean "signed"?',
    ),
]
WRONG_NUMBER = [
    ("[server]\npriority = -1", "2: server.priority: must be at least 0"),
    ("[server]\npriority = 2147483648", "2: server.priority: must be at most 2147483647"),
    (f"{A}priority = -1", "4: upstream[0].priority: must be at least 0"),
    (f"{A}max_connections = 1", "4: upstream[0].max_connections: must be at least 2"),
    (
        "[server]\nworkers = 65",
        '2: server.workers: expected a whole number from 1 to 64, or "auto"',
    ),
    (
        "[server]\nworkers = 0",
        '2: server.workers: expected a whole number from 1 to 64, or "auto"',
    ),
    (
        '[server]\n\nworkers = "1"',
        '3: server.workers: expected a whole number from 1 to 64, or "auto"',
    ),
]
WRONG_QUANTITY = [
    (
        '[store]\nmax_size = "50G"',
        (
            '2: store.max_size: "50G" has an unknown unit: expected "B", "kB", "MB", "GB", "TB", '
            '"PB", "KiB", "MiB", "GiB", "TiB" or "PiB"'
        ),
    ),
    ("[store]\nmin_free = -1", "2: store.min_free: must not be negative"),
    (
        "[prefetch]\nbudget = 1.5",
        '2: prefetch.budget: expected a size like "50GiB", or a whole number of bytes',
    ),
    (
        '[server]\nshutdown_timeout = "1w"',
        '2: server.shutdown_timeout: "1w" has an unknown unit: expected "ms", "s", "m", "h" or "d"',
    ),
    (
        "[policy]\nnegative_ttl = true",
        '2: policy.negative_ttl: expected a duration like "60s", or a number of seconds',
    ),
    (
        "[policy]\nlookup_budget = 0",
        "2: policy.lookup_budget: must be more than 0: nothing answers in no time",
    ),
    (
        f'{A}connect_timeout = "0s"',
        "4: upstream[0].connect_timeout: must be more than 0: nothing answers in no time",
    ),
    (f"{A}read_timeout = inf", "4: upstream[0].read_timeout: must be at most ten years"),
]
_FORMS = "expected host:port, [v6]:port or unix:/path"
WRONG_ADDRESS = [
    ('listen = ["8627"]', f'2: server.listen[0]: "8627" is not an address, {_FORMS}'),
    ('listen = [\n"::1:8627"]', f'3: server.listen[0]: "::1:8627" is not an address, {_FORMS}'),
    ('listen = ["a:80 "]', f'2: server.listen[0]: "a:80 " is not an address, {_FORMS}'),
    (
        'listen = [":8627"]',
        (
            f'2: server.listen[0]: ":8627" is not an address, {_FORMS}: '
            'every interface is "0.0.0.0" or "[::]"'
        ),
    ),
    (
        'listen = ["*:8627"]',
        (
            f'2: server.listen[0]: "*:8627" is not an address, {_FORMS}: '
            'every interface is "0.0.0.0" or "[::]"'
        ),
    ),
    ('listen = ["a:65536"]', '2: server.listen[0]: "a:65536": a port is at most 65535'),
    (
        'listen = ["[1.2.3.4]:80"]',
        '2: server.listen[0]: "[1.2.3.4]:80": what is in brackets is not an IPv6 address',
    ),
    (
        'listen = ["unix:run/s"]',
        '2: server.listen[0]: "run/s" must be absolute, or begin with "~/" or a variable',
    ),
    (
        f'listen = ["unix:/{"s" * 107}"]',
        f'2: server.listen[0]: "/{"s" * 107}" is too long: a socket has at most 107 bytes',
    ),
    ('listen = ["a:1",\n"b:1",\n"a:1"]', '4: server.listen[2]: "a:1" is given twice'),
]
WRONG_PATH = [
    ('path = ""', '2: store.path: "" is not a path'),
    ('path = "/a\\u0000"', r'2: store.path: "/a\x00" is not a path'),
    (
        'path = "a"',
        '2: store.path: "a" must be absolute, or begin with "~/" or a variable',
    ),
    (
        'path = "~you/a"',
        '2: store.path: "~you/a" must be absolute, or begin with "~/" or a variable',
    ),
    ('path = "$NOWHERE/a"', '2: store.path: "$NOWHERE/a": $NOWHERE is not set'),
    ('path = "/a$"', '2: store.path: "/a$": a "$" that begins no name is written "$$"'),
]
WRONG_KEYS = [
    (
        '[trust]\nkeys = [\n  # mine\n  "office-1",\n]',
        "4: trust.keys[0]: public key: no colon between name and value",
    ),
    (
        f'[trust]\nkeys = [\n  "{OFFICE_KEY}",\n  "{OTHER_OFFICE_KEY}" ]',
        '4: trust.keys[1]: another key with the name "office-1" is trusted already',
    ),
    (
        f'{A}keys = [""]',
        "4: upstream[0].keys[0]: public key: no colon between name and value",
    ),
    (
        f"trust.keys = []\n\n{A}",
        (
            "3: upstream[0].keys: nothing it says can be trusted: no keys here or in [trust], "
            'and trust is "signed"'
        ),
    ),
    (
        f"{A}\nkeys = []",
        (
            "5: upstream[0].keys: nothing it says can be trusted: no keys here or in [trust], "
            'and trust is "signed"'
        ),
    ),
    (
        f'{A}keys = ["{OFFICE_KEY}"]\ntrust = "none"',
        '4: upstream[0].keys: trust = "none" asks for no keys',
    ),
]
_NAME_RULE = 'is not a name: a to z, 0 to 9, "_" and "-", at most 32, a letter or digit first'
WRONG_UPSTREAM = [
    ('name = "NixOS"\nurl = "https://a"', f'2: upstream[0].name: "NixOS" {_NAME_RULE}'),
    ('name = "-a"\nurl = "https://a"', f'2: upstream[0].name: "-a" {_NAME_RULE}'),
    ('name = "a\\n"\nurl = "https://a"', rf'2: upstream[0].name: "a\n" {_NAME_RULE}'),
    (
        f'name = "{"a" * 33}"\nurl = "https://a"',
        f'2: upstream[0].name: "{"a" * 33}" {_NAME_RULE}',
    ),
    (
        'name = "a"\nurl = "https://a"\n[[upstream]]\nname = "a"\nurl = "https://b"',
        '5: upstream[1].name: "a" is given twice',
    ),
    (
        'name = "a"\nurl = "https://a"\n[[upstream]]\nname = "b"\nurl = "HTTPS://a:443/"',
        '6: upstream[1].url: "https://a" is given twice',
    ),
]
WRONG_URL = [
    ("", '"" is not a URL: only visible ASCII characters can be part of one'),
    (
        "https://käse.example",
        '"https://käse.example" is not a URL: only visible ASCII characters can be part of one',
    ),
    ("a.example", '"a.example" does not begin with "http://" or "https://"'),
    ("file:///srv", '"file:///srv" does not begin with "http://" or "https://"'),
    ("https:a", '"https:a" has no valid host and port'),
    ("https:///a", '"https:///a" has no valid host and port'),
    ("https://:80", '"https://:80" has no valid host and port'),
    ("https://a:x", '"https://a:x" has no valid host and port'),
    ("https://a:0", '"https://a:0" has no valid host and port'),
    ("https://a:65536", '"https://a:65536" has no valid host and port'),
    ("https://-a", '"https://-a" has no valid host and port'),
    ("https://a,b", '"https://a,b" has no valid host and port'),
    ("https://[::1", '"https://[::1" has no valid host and port'),
    ("https://a:", '"https://a:" has no valid host and port'),
    ("https://[::1]a", '"https://[::1]a" has no valid host and port'),
    ("https://a[::1]", '"https://a[::1]" has no valid host and port'),
    ("https://[1::2::3]", '"https://[1::2::3]" has no valid host and port'),
    ("https://[v1.a:b]", '"https://[v1.a:b]" has no valid host and port'),
    ("https://[::x]", '"https://[::x]" has no valid host and port'),
    ("https://a/#b", '"https://a/#b" has a fragment'),
    (
        "https://a?priority=1",
        (
            '"https://a?priority=1" has a query: '
            'what Nix says by "?priority=" is a key of its own here'
        ),
    ),
    ("http://me:pw@", '"http://…@" has no valid host and port'),
    ("http://a:b%3Ac@d@/", '"http://…@/" has no valid host and port'),
    ("http://a:%ff@d", '"http://…@d" has a user or password that is not UTF-8'),
    ("http://a%3Ab:c@d", '"http://…@d" a user has neither ":" nor control characters'),
    ("http://a:%0Ac@d", '"http://…@d" a password has no control characters'),
]
_WAYS = "one of bearer, bearer_file, netrc, user and password, user and password_file"
WRONG_AUTH = [
    ("auth = {}", f"4: upstream[0].auth: expected {_WAYS}"),
    ('auth = { user = "a" }', f"4: upstream[0].auth: expected {_WAYS}"),
    ('auth = { password = "a" }', f"4: upstream[0].auth: expected {_WAYS}"),
    ('[upstream.auth]\nnetrc = "/a"\nbearer = "b"', f"4: upstream[0].auth: expected {_WAYS}"),
    (
        'auth.bearer = "a b"',
        (
            "4: upstream[0].auth.bearer: "
            "a token has one visible ASCII character or more, and no others"
        ),
    ),
    (
        'auth = { bearer = "" }',
        (
            "4: upstream[0].auth.bearer: "
            "a token has one visible ASCII character or more, and no others"
        ),
    ),
    (
        '[upstream.auth]\nuser = "a:b"\npassword = ""',
        '5: upstream[0].auth.user: a user has neither ":" nor control characters',
    ),
    (
        '[upstream.auth]\nuser = ""\npassword = "\\r"',
        "6: upstream[0].auth.password: a password has no control characters",
    ),
]


def _in(table: str, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{table}\n{text}", message) for text, message in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(text, message, id=f"{number}: {message}")
        for number, (text, message) in enumerate(
            [
                *WRONG_TOML,
                *UNKNOWN,
                *MISSING,
                *WRONG_TYPE,
                *NO_ALTERNATIVE,
                *WRONG_GLOBS,
                *WRONG_NUMBER,
                *WRONG_QUANTITY,
                *_in("[server]", WRONG_ADDRESS),
                *_in("[store]", WRONG_PATH),
                *WRONG_KEYS,
                *_in("[[upstream]]", WRONG_UPSTREAM),
                *((f"{A}{text}", message) for text, message in WRONG_AUTH),
            ]
        )
    ],
)
def test_message(text: str, message: str) -> None:
    """What is wrong is said with file, line, key and what would be right."""
    error = refusal(text)

    assert str(error) == f"{FILE}:{message}"
    where = (f"{error.file}:{error.line}", error.key, error.reason)
    assert ": ".join(part for part in where if part) == str(error)


@pytest.mark.parametrize(("url", "reason"), WRONG_URL)
def test_message_about_url(url: str, reason: str) -> None:
    """What is wrong with a URL is said without what stands before the ``@``."""
    error = refusal(f'[[upstream]]\nname = "a"\n\nurl = "{url}"')

    assert (error.file, error.line, error.key) == (FILE, 4, "upstream[0].url")
    assert error.reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"x = {'1' * 5000}", "not TOML: a number has too many digits"),
        (f"x = {'[' * 5000}", "not TOML: nested too deeply"),
    ],
    ids=["digits", "depth"],
)
def test_message_about_what_only_python_minds(text: str, reason: str) -> None:
    """Limits of Python's parser are errors of the file, although it tells no line for them."""
    assert str(refusal(text)) == f"{FILE}: {reason}"


def test_message_about_user_in_url_and_auth() -> None:
    """Of two ways to authenticate, none is silently dropped."""
    error = refusal('[[upstream]]\nname = "a"\nurl = "https://me@a"\nauth.bearer = "b"')

    assert str(error) == f"{FILE}:4: upstream[0].auth: the url has a user already"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("auth = {{ bearer_file = {} }}", "auth.bearer_file"),
        ("auth.netrc = {}", "auth.netrc"),
        ('auth = {{ user = "a", password_file = {} }}', "auth.password_file"),
        ("ca_file = {}", "ca_file"),
    ],
)
def test_message_about_missing_file(tmp_path: Path, line: str, key: str) -> None:
    """A file that is not there is told at start, not on the first request that needs it."""
    file = tmp_path / "missing"

    missing = refusal(A + line.format(repr(str(file))))
    folder = refusal(A + line.format(repr(str(tmp_path))))
    unset = refusal(A + line.format('"$CREDENTIALS_DIRECTORY/a"'))

    where = f"{FILE}:4: upstream[0].{key}:"
    assert str(missing) == f'{where} "{file}": No such file or directory'
    assert str(folder) == f'{where} "{tmp_path}" is a directory'
    assert str(unset) == (f'{where} "$CREDENTIALS_DIRECTORY/a": $CREDENTIALS_DIRECTORY is not set')


def test_message_without_any_home() -> None:
    """Where nothing says where caches are, store.path has to."""
    reason = (
        "store.path: is missing, "
        "and none of $CACHE_DIRECTORY, $XDG_CACHE_HOME and $HOME says where caches are"
    )

    for text, where in [("", f"{FILE}: "), ("\n[store]\n", f"{FILE}:2: ")]:
        with pytest.raises(ConfigError) as caught:
            parse(text, FILE, environ={})
        assert str(caught.value) == where + reason
    with pytest.raises(ConfigError) as caught:
        load(None, environ={})
    assert str(caught.value) == reason


def test_message_about_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A configuration that is missing, a folder or not text is told in one line."""
    latin = tmp_path / "latin.toml"
    latin.write_bytes("[log]\n# größer\n".encode("latin-1"))

    for path, message in [
        (tmp_path / "no.toml", f"{tmp_path}/no.toml: cannot be read: No such file or directory"),
        (tmp_path, f"{tmp_path}: cannot be read: Is a directory"),
        (latin / "x", f"{latin}/x: cannot be read: Not a directory"),
        (latin, f"{latin}:2: is not UTF-8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == message


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    """A byte order mark and CRLF change neither the meaning nor the lines."""
    file = tmp_path / FILE
    file.write_bytes(b"\xef\xbb\xbf[server]\r\npriority = 7\r\n")
    wrong = tmp_path / "wrong.toml"
    wrong.write_bytes(b"[server]\r\n\r\npriority = -7\r\n")

    assert load(file, environ={"HOME": "/home/me"}).server.priority == 7
    with pytest.raises(ConfigError, match=r"wrong\.toml:3: server\.priority:"):
        load(wrong)


@pytest.mark.parametrize(
    "text",
    [
        A + 'auth = { bearer = "s3cret s3cret" }',
        A + 'auth = { bearer = "s3cret", user = "me" }',
        A + 'auth = { user = "me", password = "s3cret\\n" }',
        A + 'auth = { user = "s3cret:x", password = "" }',
        A + 'auth = "s3cret"',
        A + "auth = { bearer = { s3cret = 1 } }",
        '[[upstream]]\nname = "a"\nurl = "ftp://me:s3cret@a.example"',
        '[[upstream]]\nname = "a"\nurl = "me:s3cret@a.example"',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret@"',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret/@a.example"',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret?@a.example"',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret\\n@a.example"',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret%00@a.example"',
        '[[upstream]]\nname = "a"\nurl = "https://me:@s3cret@a@example:x"',
        2 * '[[upstream]]\nname = "a"\nurl = "https://me:s3cret@a.example"\n',
        '[trust]\nkeys = ["office-1:s3cret"]',
    ],
)
def test_secrets_are_not_in_messages(text: str) -> None:
    """A message can be sent to anybody, and so can what Python keeps with it."""
    error = refusal(text)

    assert "s3cret" not in str(error)
    assert error.__cause__ is None


_TOKENS = st.sampled_from(
    [
        *("server", "listen", "upstream", "name", "url", "auth", "keys", "x", "1", "-1", "true"),
        *("[", "]", "[[", "]]", "{", "}", "=", ",", ".", "#", '"', "'", "\\", "\n", " "),
        *('"a"', '"https://a"', '"a:1"'),
    ]
)
_KEYS = st.sampled_from(
    [
        *("server", "store", "trust", "upstream", "policy", "prefetch", "log", "other"),
        *("server.listen", "server.workers", "server.other", "store.path", "store.max_size"),
        *("trust.keys", "policy.upstream_down", "policy.negative_ttl", "prefetch.narinfos"),
        *("log.level", "other.other", '"\\n"', "log.'`'"),
    ]
)
_VALUES = st.sampled_from(
    [
        *(
            "1",
            "-1",
            "0",
            "true",
            "1.5",
            "inf",
            "nan",
            "1979-05-27",
            "1979-05-27T07:32:00Z",
            "'1s'",
        ),
        *("'a'", "'/a'", "'$A'", "'a:1'", "[]", "['a']", "['a:1', 1]", "[[]]", "[{}]", "{}"),
        *("{ listen = 1 }", "{ level = 'debug' }", "[{ name = 'a' }, { url = 'b' }]"),
        *("[{ name = 'a', url = 'https://a', auth = { bearer = '' } }]", "'\\'", '"\\u0000"'),
    ]
)
_STATEMENTS = st.builds("{} = {}".format, _KEYS, _VALUES)


@given(
    st.lists(_TOKENS | st.text(string.printable, max_size=3)).map("".join)
    | st.lists(_STATEMENTS, max_size=4).map("\n".join)
)
def test_any_text_is_understood_or_refused_in_one_line(text: str) -> None:
    """There is no text that ends in a traceback, or in a message that breaks a log."""
    try:
        config = parse(text, FILE, environ={"HOME": "/home/me"})
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017 - either of two outcomes is right
    else:
        assert isinstance(config, Config)
