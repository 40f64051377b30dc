"""trimig.config: TLS credentials and allow-lists, in Python, TOML and on a command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from trimig.config import (
    AuthzList,
    AuthzRule,
    AuthzSimple,
    Config,
    TlsPsk,
    TlsX509,
    parse_object,
    read_object,
)
from trimig.errors import ConfigError

NAME = "C=DE,O=Example\\, Inc.,CN=host-a"


def refusal(call: Callable[[], object]) -> ConfigError:
    """The ConfigError that *call* raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tls-creds-x509,id=tls0,dir=/etc/pki", TlsX509(id="tls0", dir="/etc/pki")),
        (
            "tls-creds-x509,id=tls0,dir=/a,,b,endpoint=client,verify-peer=off,sanity-check=off",
            TlsX509(id="tls0", dir="/a,b", endpoint="client", verify_peer=False, sanity_check=False),
        ),
        (
            "qom-type=tls-creds-psk,id=p.1,dir=keys,endpoint=server,username=me",
            TlsPsk(id="p.1", dir="keys", endpoint="server", username="me"),
        ),
        ("authz-simple,id=a,identity=C=DE,,O=Example\\,, Inc.,,CN=host-a", AuthzSimple(id="a", identity=NAME)),
        (
            "authz-list,id=a,rules.1.match=*,rules.1.policy=allow,rules.1.format=glob,rules.0.match=x,rules.0.policy=deny",
            AuthzList(
                id="a",
                rules=(AuthzRule(match="x", policy="deny"), AuthzRule(match="*", policy="allow", format="glob")),
            ),
        ),
        (
            json.dumps({"qom-type": "authz-list", "id": "a", "rules": [{"match": "CN=x", "policy": "allow"}]}),
            AuthzList(id="a", rules=(AuthzRule(match="CN=x", policy="allow"),)),
        ),
    ],
)
def test_object_is_written_as_for_qemu(text: str, expected: object) -> None:
    assert parse_object(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no object type ''"),
        ("tls-creds-x508,id=a,dir=b", "did you mean tls-creds-x509"),
        ("tls-creds-x509,id=a", "needs 'dir'"),
        ("tls-creds-x509,dir=a", "needs 'id'"),
        ("tls-creds-x509,id=a,dir=", "expects the path of a directory"),
        ("tls-creds-x509,id=0a,dir=b", "expects a letter, followed by"),
        ("tls-creds-x509,id=a,dir=b,endpoint=both", "expects one of client, server"),
        ("tls-creds-x509,id=a,dir=b,verify-peer=maybe", "expects true or false, not 'maybe'"),
        ("tls-creds-x509,id=a,dir=b,verify-pear=on", "did you mean verify-peer"),
        ("tls-creds-x509,id=a,dir=b,priority=NORMAL", "GnuTLS, and trimig uses OpenSSL"),
        ("tls-creds-x509,id=a,dir=b,passwordid=s", "give the key without one"),
        ("tls-creds-x509,id=a,dir=b,sanity-check=perhaps", "expects true or false"),
        ("tls-creds-x509,id=a,id=b,dir=c", "'id' is given twice"),
        ("tls-creds-x509,id=a,dir", "as NAME=VALUE, not 'dir'"),
        ("authz-simple,id=a", "needs 'identity'"),
        ("authz-list,id=a,rules.0.match=x", "authz-list rule needs 'policy'"),
        ("authz-list,id=a,rules.0.match=x,rules.0.policy=perhaps", "expects one of allow, deny"),
        ("authz-list,id=a,rules=x", "expects a list of rules"),
        ("{", "not valid JSON"),
        ("{}", "needs its 'qom-type'"),
        ('{"qom-type": 1}', "needs its 'qom-type'"),
        ("[1]", "there is no object type"),
    ],
)
def test_what_is_wrong_with_an_object_is_said(text: str, words: str) -> None:
    error = refusal(lambda: parse_object(text))
    assert words in str(error)


def test_objects_made_in_python_are_checked_too() -> None:
    assert refusal(lambda: TlsX509(id="a b", dir="x")).name == "id"
    assert refusal(lambda: TlsX509(id="a", dir="x", endpoint="peer")).name == "endpoint"  # type: ignore[arg-type]  # the point
    assert refusal(lambda: TlsPsk(id="a", dir="")).name == "dir"
    assert refusal(lambda: AuthzList(id="a", rules=("x",))).name == "rules"  # type: ignore[arg-type]  # the point
    assert refusal(lambda: AuthzRule(match="x", policy="maybe")).name == "policy"  # type: ignore[arg-type]  # the point
    assert refusal(lambda: Config(objects=[AuthzSimple(id="a", identity="x")])).name == "objects"  # type: ignore[arg-type]  # the point
    twice = (AuthzSimple(id="a", identity="x"), TlsPsk(id="a", dir="x"))
    assert "two objects with the id 'a'" in str(refusal(lambda: Config(objects=twice)))


def test_toml_has_objects_as_an_array_of_tables() -> None:
    config = Config.from_toml("""
        [parameters]
        tls-creds = "tls0"
        tls-authz = "who"
        [[objects]]
        qom-type = "tls-creds-x509"
        id = "tls0"
        dir = "/etc/pki/qemu"
        verify_peer = true
        [[objects]]
        qom-type = "authz-list"
        id = "who"
        rules = [{match = "*,CN=host-?", policy = "allow", format = "glob"}]
        """)
    rule = AuthzRule(match="*,CN=host-?", policy="allow", format="glob")
    assert config.objects == (TlsX509(id="tls0", dir="/etc/pki/qemu"), AuthzList(id="who", rules=(rule,)))
    assert config.parameters.tls_creds == "tls0"
    assert "objects[0]: tls-creds-x509 needs 'dir'" in str(
        refusal(lambda: Config.from_toml('[[objects]]\nqom-type = "tls-creds-x509"\nid = "a"'))
    )
    assert "under [[objects]]" in str(refusal(lambda: Config.from_toml('[objects]\nid = "a"')))


def test_command_line_adds_objects_and_has_a_short_form() -> None:
    base = Config(objects=(TlsX509(id="tls0", dir="old"), AuthzSimple(id="a", identity="x")))
    config = base.with_options(objects=["tls-creds-x509,id=tls0,dir=new"], parameters=["tls-creds=tls0"])
    assert config.objects == (TlsX509(id="tls0", dir="new"), AuthzSimple(id="a", identity="x"))
    short = Config().with_options(tls="pki")
    assert [(one.id, one.dir) for one in short.objects if isinstance(one, TlsX509)] == [
        (short.parameters.tls_creds, "pki")
    ]
    assert Config().with_options(parameters=["tls-creds=other"], tls="pki").parameters.tls_creds == "other"


@pytest.mark.parametrize(
    ("pattern", "format_", "allowed"),
    [
        (NAME, "exact", True),
        ("C=DE,*,CN=host-a", "exact", False),
        ("C=DE,*,CN=host-a", "glob", True),
        ("*CN=host-?", "glob", True),
        ("CN=host-a", "glob", False),
        ("*[a]", "glob", False),
        ("*.*", "glob", True),
        ("*..*", "glob", False),
    ],
)
def test_rule_matches_as_in_qemu(pattern: str, format_: str, *, allowed: bool) -> None:
    rule = read_object(
        {"qom-type": "authz-list", "id": "a", "rules": [{"match": pattern, "policy": "allow", "format": format_}]}
    )
    assert isinstance(rule, AuthzList)
    assert rule.allows(NAME) is allowed


def test_first_rule_that_matches_counts_and_the_policy_if_none_does() -> None:
    rules = (AuthzRule(match="CN=bad", policy="deny"), AuthzRule(match="CN=*", policy="allow", format="glob"))
    listed = AuthzList(id="a", rules=rules)
    assert [listed.allows(name) for name in ("CN=bad", "CN=good", "O=x")] == [False, True, False]
    assert AuthzList(id="a", policy="allow").allows("O=x")
    simple = AuthzSimple(id="a", identity=NAME)
    assert simple.allows(NAME)
    assert not simple.allows(NAME.lower())
