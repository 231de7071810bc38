"""The configuration: what a file means, and what flags change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proxy.config import (
    BasicAuth,
    BearerAuth,
    Config,
    LogConfig,
    NetrcAuth,
    PolicyConfig,
    PrefetchConfig,
    Secret,
    ServerConfig,
    StoreConfig,
    TcpListen,
    TrustConfig,
    UnixListen,
    UpstreamConfig,
    load,
    parse,
)
from proxy.errors import ConfigError
from proxy.nix.signature import PublicKey

FILE = "config.toml"
NANNA_KEY = "nanna-coder.cachix.org-1:U/8OwBxzrmKhrghm7KtNA3cRnYR5ioKlB637gbc2BF4="
NIXOS_KEY = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
OFFICE_KEY = "office-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
OTHER_OFFICE_KEY = "office-1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
A = '[[upstream]]\nname = "a"\nurl = "https://a.example"\n'
B = '[[upstream]]\nname = "b"\nurl = "https://b.example"\n'


def read(text: str, **environ: str) -> Config:
    """Return what a file means to somebody at home in /home/me."""
    return parse(text, FILE, environ={"HOME": "/home/me", **environ})


def upstream(lines: str, **environ: str) -> UpstreamConfig:
    """Return what the only upstream of a file means."""
    (only,) = read(A + lines, **environ).upstreams
    return only


# What it means


def test_defaults() -> None:
    """Without a file, everything is as the design says."""
    assert load(None, environ={"HOME": "/home/me"}) == Config(
        server=ServerConfig(
            listen=(TcpListen("127.0.0.1", 8627),), workers=1, priority=30, shutdown_timeout=20.0
        ),
        store=StoreConfig(
            path=Path("/home/me/.cache/nix-cache-proxy"), max_size=50 * 2**30, min_free=2**30
        ),
        trust=TrustConfig((PublicKey.parse(NANNA_KEY), PublicKey.parse(NIXOS_KEY))),
        upstreams=(
            UpstreamConfig(
                name="nanna-coder",
                url="https://nanna-coder.cachix.org",
                keys=None,
                trust="signed",
                priority=1,
                connect_timeout=5.0,
                read_timeout=30.0,
                max_connections=128,
                auth=None,
                ca_file=None,
                allow=None,
                deny=(),
            ),
            UpstreamConfig(
                name="nixos",
                url="https://cache.nixos.org",
                keys=None,
                trust="signed",
                priority=2,
                connect_timeout=5.0,
                read_timeout=30.0,
                max_connections=128,
                auth=None,
                ca_file=None,
                allow=None,
                deny=(),
            ),
        ),
        policy=PolicyConfig(
            mode="auto", upstream_down="not-found", negative_ttl=60.0, lookup_budget=8.0
        ),
        prefetch=PrefetchConfig(narinfos=True, nars="wanted", budget=64 * 2**20),
        log=LogConfig(level="info", format="auto"),
    )


def test_an_empty_file_is_the_defaults() -> None:
    """A file that says nothing changes nothing."""
    assert read("# nothing\n") == load(None, environ={"HOME": "/home/me"})


def test_everything_can_be_set() -> None:
    """Each key of each table but [[upstream]] arrives where it belongs."""
    config = read(f"""
        server = {{ listen = ["0.0.0.0:80"], workers = 1, priority = 0, shutdown_timeout = 0 }}
        store = {{ path = "/srv/nix", max_size = 0, min_free = "10GB" }}
        trust.keys = ["{OFFICE_KEY}"]
        policy = {{ mode = "offline", upstream_down = "error", negative_ttl = "500ms", lookup_budget = 1.5 }}
        prefetch = {{ narinfos = false, nars = "off", budget = 1024 }}
        log = {{ level = "debug", format = "json" }}
    """)

    assert config.server == ServerConfig((TcpListen("0.0.0.0", 80),), 1, 0, 0.0)
    assert config.store == StoreConfig(Path("/srv/nix"), 0, 10 * 10**9)
    assert config.trust == TrustConfig((PublicKey.parse(OFFICE_KEY),))
    assert config.policy == PolicyConfig("offline", "error", 0.5, 1.5)
    assert config.prefetch == PrefetchConfig(narinfos=False, nars="off", budget=1024)
    assert config.log == LogConfig("debug", "json")


def test_everything_of_an_upstream_can_be_set(tmp_path: Path) -> None:
    """Each key of [[upstream]] arrives where it belongs."""
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()

    only = upstream(f"""
        keys = ["{OFFICE_KEY}"]
        trust = "signed"
        priority = 7
        connect_timeout = "1s"
        read_timeout = "2m"
        max_connections = 3
        auth.bearer = "T0ken"
        ca_file = "{ca_file}"
        allow = ["acme-*"]
        deny = ["*-src", "linux-?.*"]
    """)

    assert only == UpstreamConfig(
        name="a",
        url="https://a.example",
        keys=(PublicKey.parse(OFFICE_KEY),),
        trust="signed",
        priority=7,
        connect_timeout=1.0,
        read_timeout=120.0,
        max_connections=3,
        auth=BearerAuth(Secret("T0ken")),
        ca_file=ca_file,
        allow=("acme-*",),
        deny=("*-src", "linux-?.*"),
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8627", TcpListen("127.0.0.1", 8627)),
        ("localhost:0", TcpListen("localhost", 0)),
        ("[::1]:65535", TcpListen("::1", 65535)),
        ("[fe80::1%eth0]:80", TcpListen("fe80::1%eth0", 80)),
        ("unix:/run/proxy.sock", UnixListen(Path("/run/proxy.sock"))),
        ("unix:$RUNTIME_DIRECTORY/s", UnixListen(Path("/run/x/s"))),
    ],
)
def test_listen(text: str, address: TcpListen | UnixListen) -> None:
    """The three forms of addresses are understood."""
    config = read(f'server.listen = ["{text}"]', RUNTIME_DIRECTORY="/run/x")

    assert config.server.listen == (address,)


@pytest.mark.parametrize("text", ["127.0.0.1:8627", "[::1]:80", "unix:/run/proxy.sock"])
def test_listen_is_shown_as_written(text: str) -> None:
    """An address in a log can be copied into the file."""
    (address,) = read(f'server.listen = ["{text}"]').server.listen

    assert str(address) == text


def test_listen_may_be_several_or_none() -> None:
    """Port 0 is a different port each time, and systemd's sockets may be all there is."""
    several = read('server.listen = ["localhost:0", "localhost:0", "unix:/a"]').server.listen

    assert several == (*[TcpListen("localhost", 0)] * 2, UnixListen(Path("/a")))
    assert read("server.listen = []").server.listen == ()


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"CACHE_DIRECTORY": "/var/cache/x"}, "/var/cache/x"),
        ({"CACHE_DIRECTORY": "/var/cache/x:/var/cache/y"}, "/var/cache/x"),
        ({"CACHE_DIRECTORY": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"CACHE_DIRECTORY": "", "XDG_CACHE_HOME": "/x"}, "/x/nix-cache-proxy"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/nix-cache-proxy"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/nix-cache-proxy"),
    ],
    ids=str,
)
def test_default_store(environ: dict[str, str], path: str) -> None:
    """The store is where systemd says, else in the user's cache directory."""
    assert read("", **environ).store.path == Path(path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/srv/nix", "/srv/nix"),
        ("~", "/home/me"),
        ("~/nix", "/home/me/nix"),
        ("$BIG/nix", "/mnt/big/nix"),
        ("${BIG}ger", "/mnt/bigger"),
        ("/srv/$$BIG", "/srv/$BIG"),
        ("/srv/~", "/srv/~"),
    ],
)
def test_paths_are_expanded(text: str, path: str) -> None:
    """``~`` and variables mean in a path what they mean in a shell."""
    assert read(f'store.path = "{text}"', BIG="/mnt/big").store.path == Path(path)


def test_environment_is_the_process_own_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an environment, variables in paths are those of the process."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / FILE
    file.write_text('store.path = "$HOME/nix"')

    path = tmp_path / "nix"
    assert load(file).store.path == path
    assert parse(file.read_text(), FILE).store.path == path
    assert load(None).with_overrides(store="~/nix").store.path == path


def test_upstreams_are_sorted_by_preference() -> None:
    """The lowest priority comes first, its default is the place in the file, and ties keep it."""
    tables = [
        f'[[upstream]]\nname = "{name}"\nurl = "https://{name}.example"\n{priority}\n'
        for name, priority in [
            ("first", ""),
            ("second", "priority = 9"),
            ("third", ""),
            ("tie", "priority = 1"),
            ("zero", "priority = 0"),
        ]
    ]

    upstreams = read("".join(tables)).upstreams

    assert [(each.name, each.priority) for each in upstreams] == [
        ("zero", 0),
        ("first", 1),
        ("tie", 1),
        ("third", 3),
        ("second", 9),
    ]


def test_upstreams_may_be_none() -> None:
    """A mirror of what is in the store asks nobody."""
    assert read("upstream = []").upstreams == ()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://a.example/", "https://a.example"),
        ("HTTPS://A.Example:443", "https://a.example"),
        ("http://a.example:80//", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("https://[::1]:8080/cache/", "https://[::1]:8080/cache"),
        ("https://a.example./Team%20A", "https://a.example./Team%20A"),
    ],
)
def test_url_has_one_spelling(text: str, url: str) -> None:
    """The same cache is recognised as such, and paths can be appended to its URL."""
    (only,) = read(f'[[upstream]]\nname = "a"\nurl = "{text}"').upstreams

    assert only.url == url


@pytest.mark.parametrize(
    ("user", "auth"),
    [
        ("me:p%40ss%3Aw", BasicAuth("me", Secret("p@ss:w"))),
        (":token", BasicAuth("", Secret("token"))),
        ("me", BasicAuth("me", Secret(""))),
    ],
)
def test_user_in_url_becomes_auth(user: str, auth: BasicAuth) -> None:
    """A user in a URL authenticates, and is gone from the URL that logs show."""
    (only,) = read(f'[[upstream]]\nname = "a"\nurl = "https://{user}@a.example/x"').upstreams

    assert (only.url, only.auth) == ("https://a.example/x", auth)


def test_auth(tmp_path: Path) -> None:
    """Each way to authenticate is understood."""
    file = tmp_path / "secret"
    file.touch()

    for text, auth in [
        ('{ bearer = "T0ken" }', BearerAuth(Secret("T0ken"))),
        ('{ bearer_file = "$DIR/secret" }', BearerAuth(file)),
        ('{ netrc = "$DIR/secret" }', NetrcAuth(file)),
        ('{ user = "me", password = "pä ss" }', BasicAuth("me", Secret("pä ss"))),
        ('{ user = "", password_file = "$DIR/secret" }', BasicAuth("", file)),
    ]:
        assert upstream(f"auth = {text}", DIR=str(tmp_path)).auth == auth


@pytest.mark.parametrize(
    "text",
    [
        A + 'auth = { bearer = "s3cret" }',
        A + 'auth = { user = "me", password = "s3cret" }',
        '[[upstream]]\nname = "a"\nurl = "https://me:s3cret@a.example"',
    ],
)
def test_secrets_are_not_shown(text: str) -> None:
    """A configuration can be logged as a whole."""
    config = read(text)

    assert config.upstreams[0].auth is not None
    assert "s3cret" not in f"{config!r}{config}"


def test_keys_of_an_upstream_replace_those_of_trust() -> None:
    """Whose signatures count: the upstream's own keys, else [trust]'s; with trust none nobody's."""
    default, own, none = read(f"""
        trust.keys = ["{NIXOS_KEY}"]
        upstream = [
          {{ name = "default", url = "https://1" }},
          {{ name = "own", url = "https://2", keys = ["{OFFICE_KEY}"] }},
          {{ name = "none", url = "https://3", trust = "none" }},
        ]
    """).upstreams
    trust = TrustConfig((PublicKey.parse(NIXOS_KEY),))

    assert default.trusted_keys(trust) == trust.keys
    assert own.trusted_keys(trust) == (PublicKey.parse(OFFICE_KEY),)
    assert none.trusted_keys(trust) is None


def test_no_keys_are_needed_where_none_count() -> None:
    """[trust] may be empty when each upstream has keys of its own or is trusted as it is."""
    config = read(f'trust.keys = []\n{A}trust = "none"\n{B}keys = ["{OFFICE_KEY}"]')

    assert config.trust.keys == ()


def test_a_key_given_twice_counts_once() -> None:
    """Copying a key in again is no mistake."""
    config = read(f'trust.keys = ["{OFFICE_KEY}", "{NIXOS_KEY}", "{OFFICE_KEY}"]')

    assert [key.name for key in config.trust.keys] == ["office-1", "cache.nixos.org-1"]


def test_the_look_ahead_can_be_turned_on_in_parts() -> None:
    """A key of [prefetch] that is set leaves the others as they are."""
    default = read("[prefetch]").prefetch

    assert default == PrefetchConfig(narinfos=True, nars="wanted", budget=64 * 2**20)
    assert read("prefetch.narinfos = false").prefetch == replace(default, narinfos=False)
    assert read('prefetch.nars = "off"').prefetch == replace(default, nars="off")
    assert read('prefetch.budget = "1GiB"').prefetch == replace(default, budget=2**30)


# What flags change


def test_without_flags_nothing_changes() -> None:
    """A flag not given leaves the configuration as it is."""
    config = read(A)

    assert config.with_overrides() == config


def test_listen_flag_replaces() -> None:
    """--listen replaces the addresses of the file, and nothing else of its table."""
    config = read("server.priority = 5").with_overrides(listen=["[::]:80", "unix:/s"])

    listen = (TcpListen("::", 80), UnixListen(Path("/s")))
    assert config.server == ServerConfig(listen, 1, 5, 20.0)


@pytest.mark.parametrize(
    ("text", "path"),
    [("/srv", "/srv"), ("~/nix", "/home/me/nix"), ("nix", Path.cwd() / "nix")],
    ids=str,
)
def test_store_flag_replaces(text: str, path: str | Path) -> None:
    """--store replaces the folder, may be relative as paths in a shell are, and nothing else."""
    config = read('store.max_size = "1GB"')

    changed = config.with_overrides(store=text, environ={"HOME": "/home/me"})

    assert changed.store == StoreConfig(Path(path), 10**9, 2**30)


def test_trusted_key_flag_adds() -> None:
    """--trusted-key adds to [trust], and not to upstreams with keys of their own."""
    config = read(f'trust.keys = ["{NIXOS_KEY}"]\n{A}{B}keys = ["{NANNA_KEY}"]')

    changed = config.with_overrides(trusted_keys=[OFFICE_KEY, NIXOS_KEY])

    trust = TrustConfig((PublicKey.parse(NIXOS_KEY), PublicKey.parse(OFFICE_KEY)))
    assert changed == replace(config, trust=trust)


def test_upstream_flag_replaces() -> None:
    """--upstream replaces all upstreams, in the order of the flags, with defaults for the rest."""
    config = read(f"{A}priority = 4\nmax_connections = 2")

    changed = config.with_overrides(
        upstreams=["https://a.example", "http://me:pw@b.example:8080/Team/"]
    )

    assert [(each.name, each.url, each.auth) for each in changed.upstreams] == [
        ("a-example", "https://a.example", None),
        ("b-example-8080-team", "http://b.example:8080/Team", BasicAuth("me", Secret("pw"))),
    ]
    assert [each.max_connections for each in changed.upstreams] == [128, 128]
    assert replace(changed, upstreams=config.upstreams) == config


def test_names_made_from_urls_are_unique_words() -> None:
    """Upstreams of flags have names that metrics and files can bear, however alike the URLs."""
    urls = [f"https://{'long-' * 10}x/{number}" for number in range(12)]

    config = read("").with_overrides(
        upstreams=[*urls, "https://[::1]", "http://a.b", "http://a-b", "https://_/"]
    )

    names = [each.name for each in config.upstreams]
    assert names[:2] == [f"{'long-' * 6}lo", f"{'long-' * 6}-2"]
    assert names[11:] == [f"{'long-' * 5}long-12", "1", "a-b", "a-b-2", "upstream"]
    assert len(set(names)) == len(names)
    for name in names:  # a file takes them, too
        read(f'[[upstream]]\nname = "{name}"\nurl = "https://a.example"')


def test_upstream_and_trusted_key_flags_belong_together() -> None:
    """An upstream of a flag may depend on the key of another flag."""
    config = read(f'trust.keys = []\n{A}keys = ["{NIXOS_KEY}"]')

    changed = config.with_overrides(upstreams=["https://b.example"], trusted_keys=[OFFICE_KEY])

    assert changed.upstreams[0].trusted_keys(changed.trust) == (PublicKey.parse(OFFICE_KEY),)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"listen": ["localhost:1", "localhost"]},
            '--listen: "localhost" is not an address, expected host:port, [v6]:port or unix:/path',
        ),
        ({"listen": ["a:1", "a:1"]}, '--listen: "a:1" is given twice'),
        ({"store": ""}, '--store: "" is not a path'),
        ({"store": "$NOWHERE"}, '--store: "$NOWHERE": $NOWHERE is not set'),
        (
            {"upstreams": ["a.example"]},
            '--upstream: "a.example" does not begin with "http://" or "https://"',
        ),
        (
            {"upstreams": ["https://me:pw@a.example?priority=1"]},
            (
                '--upstream: "https://…@a.example?priority=1" has a query: '
                'what Nix says by "?priority=" is a key of its own here'
            ),
        ),
        (
            {"upstreams": ["https://a.example", "https://A.example/"]},
            '--upstream: "https://a.example" is given twice',
        ),
        (
            {"trusted_keys": [OTHER_OFFICE_KEY]},
            '--trusted-key: another key with the name "office-1" is trusted already',
        ),
    ],
)
def test_wrong_flag_is_named(flags: dict[str, list[str]], message: str) -> None:
    """A message about a flag begins with the flag, and has neither line nor key."""
    config = read(f'trust.keys = ["{OFFICE_KEY}"]')

    with pytest.raises(ConfigError) as caught:
        config.with_overrides(**flags, environ={})  # type: ignore[arg-type]

    assert str(caught.value) == message
    assert (caught.value.line, caught.value.key) == (None, None)


def test_upstream_flag_without_any_key_is_refused() -> None:
    """Flags cannot make a configuration that no file could be."""
    config = read(f'trust.keys = []\n{A}keys = ["{NIXOS_KEY}"]')

    with pytest.raises(ConfigError, match=r"^--upstream: nothing it says can be trusted"):
        config.with_overrides(upstreams=["https://b.example"])
