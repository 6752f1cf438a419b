from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedcl.config.compose import compose as composed
from fedcl.config.conform import conform
from fedcl.config.instantiate import build
from fedcl.config.value_rules import ConfigError
from fedcl.simulation.devices import DeviceProfile, Homogeneous, Ideal, LogNormal, Tiers, Trace
from fedcl.simulation.profile import RULES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CHOICES = sorted(path.stem for path in (CONFIGS / "devices").glob("*.yaml"))
CLIENTS = tuple(str(i) for i in range(10))
TIERS: list[dict[str, Any]] = [{"share": 0.2, "speed": 4.0}, {"share": 0.5}, {"share": 0.3, "speed": 0.25}]


def settings(*overrides: str) -> dict[str, Any]:
    trees = []
    for chosen in (overrides, overrides[:1]):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            tree = OmegaConf.to_container(compose(None, overrides=list(chosen)), resolve=True)
        assert isinstance(tree, dict)
        trees.append({str(key): value for key, value in tree.items()})
    return conform(*trees)["devices"]  # type: ignore[no-any-return]


# --- one profile


def test_a_visit_takes_its_latency_its_bytes_and_its_steps() -> None:
    profile = DeviceProfile(step_seconds=0.5, speed=2.0, down=100.0, up=50.0, latency=3.0)
    assert profile.duration(steps=8, bytes_down=200, bytes_up=400) == 3 + 2 + 8 * 0.25 + 8


def test_the_default_device_takes_no_time_and_is_always_there() -> None:
    profile = DeviceProfile()
    assert profile.duration(10**6, 10**9, 10**9) == 0.0
    assert all(profile.available(t) and profile.available_from(t) == t for t in (0.0, 0.1, 1e15))
    assert not any(profile.drops(0, "a", visit) for visit in range(100))


def test_availability_by_hand() -> None:
    profile = DeviceProfile(period=10.0, duty=0.25, phase=9.0)  # there from 1 to 3.5, from 11 to 13.5, ...
    assert [t for t in (0.0, 0.5, 1.0, 3.0, 3.5, 10.5, 11.0) if profile.available(t)] == [1.0, 3.0, 11.0]
    assert [profile.available_from(t) for t in (0.0, 1.0, 2.0, 3.5, 10.0, 12.5)] == [1.0, 1.0, 2.0, 11.0, 11.0, 12.5]


@given(
    t=st.floats(0, 1e9),
    period=st.floats(1e-2, 1e6),
    duty=st.floats(1e-3, 1),
    phase=st.floats(0, 1e6),
)
def test_it_is_there_from_when_it_says_and_not_earlier(t: float, period: float, duty: float, phase: float) -> None:
    profile = DeviceProfile(period=period, duty=duty, phase=phase)
    start = profile.available_from(t)
    assert start >= t
    assert profile.available(start)
    assert start <= t + period * (1 + 1e-6) + 1e-6
    if start > t:
        assert not profile.available(t)
        rounding = 4 * math.ulp(start + phase + period)
        assert start - rounding <= t or not profile.available(start - rounding)


@given(t=st.floats(0, 1e6), period=st.floats(0.5, 1e4), duty=st.floats(0.05, 0.95), fraction=st.floats(0.001, 0.999))
def test_between_being_away_and_coming_back_it_is_away(t: float, period: float, duty: float, fraction: float) -> None:
    profile = DeviceProfile(period=period, duty=duty)
    start = profile.available_from(t)
    assume(start > t)
    between = t + (start - t) * fraction
    assert between == start or not profile.available(between)


@given(cycle=st.integers(0, 10**7), period=st.floats(0.1, 1e3), phase=st.floats(0, 1e3))
def test_the_edges_of_windows_are_safe(cycle: int, period: float, phase: float) -> None:
    profile = DeviceProfile(period=period, duty=0.1, phase=phase)
    edge = max(0.0, cycle * period - phase)
    for t in (math.nextafter(edge, 0.0), edge, math.nextafter(edge, math.inf), edge + 0.1 * period):
        assert profile.available(profile.available_from(t))


def test_a_window_that_no_float_lies_in_is_refused_instead_of_searched_for_ever() -> None:
    with pytest.raises(
        ValueError, match=r"devices\.period=1e-05: a window of .* too short for a clock at 1000000000000"
    ):
        DeviceProfile(period=1e-5, duty=1e-6).available_from(1e12)


def test_visits_drop_as_often_as_said_and_each_by_its_own_draw() -> None:
    profile = DeviceProfile(dropout=0.3)
    fates = {(client, visit): profile.drops(7, client, visit) for client in CLIENTS for visit in range(400)}
    assert abs(statistics.mean(fates.values()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(fates))
    assert all(profile.drops(7, *who) == fate for who, fate in reversed(fates.items()))
    assert [profile.drops(8, "0", v) for v in range(50)] != [fates["0", v] for v in range(50)]
    assert all(DeviceProfile(dropout=1.0).drops(0, "0", visit) for visit in range(100))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_seconds", -1.0), ("speed", 0.0), ("speed", math.nan), ("speed", math.inf), ("down", 0.0), ("up", -1.0),
        ("latency", math.inf), ("period", 0.0), ("duty", 0.0), ("duty", 1.5), ("phase", -1.0), ("dropout", 1.1),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^devices\.{name}={value}: must be {re.escape(RULES[name])}$"):
        DeviceProfile(**{name: value})


# --- families


def test_homogeneous_gives_everyone_the_same_but_the_phase() -> None:
    same = Homogeneous(clients=CLIENTS, seed=0, up=None, latency=2.0)
    assert {same.profile(c) for c in CLIENTS} == {DeviceProfile(0.01, 1.0, 1e6, math.inf, 2.0)}
    phased = Homogeneous(clients=CLIENTS, seed=0, period=60.0, duty=0.5)
    phases = [phased.profile(c).phase for c in CLIENTS]
    assert len(set(phases)) == len(CLIENTS)
    assert all(0 <= phase < 60 for phase in phases)
    assert {Homogeneous(clients=CLIENTS, seed=0, period=60.0, phase=0.0).profile(c).phase for c in CLIENTS} == {0.0}


def test_lognormal_has_its_medians_and_its_spread() -> None:
    clients = tuple(str(i) for i in range(4000))
    family = LogNormal(clients=clients, seed=3, sigma=0.8, bandwidth_sigma=0.4, down=200.0, up=100.0)
    profiles = [family.profile(client) for client in clients]
    logs = [math.log(profile.speed) for profile in profiles]
    links = [math.log(profile.down / 200.0) for profile in profiles]
    # standard error of a normal sample's median: 1.2533 sigma / sqrt(n)
    assert abs(statistics.median(logs)) < 4 * 1.2533 * 0.8 / math.sqrt(4000)
    assert abs(statistics.median(links)) < 4 * 1.2533 * 0.4 / math.sqrt(4000)
    assert statistics.stdev(logs) == pytest.approx(0.8, rel=0.05)
    assert statistics.stdev(links) == pytest.approx(0.4, rel=0.05)
    assert abs(statistics.correlation(logs, links)) < 0.07
    assert all(profile.down == pytest.approx(2 * profile.up) for profile in profiles)


def test_lognormal_without_spread_is_homogeneous() -> None:
    flat = LogNormal(clients=CLIENTS, seed=0, sigma=0.0, bandwidth_sigma=0.0, down=None, up=None)
    assert {flat.profile(c) for c in CLIENTS} == {DeviceProfile(step_seconds=0.01)}


def families(clients: tuple[str, ...], seed: int) -> list[Any]:
    return [
        Ideal(clients=clients, seed=seed),
        Homogeneous(clients=clients, seed=seed, period=10.0),
        LogNormal(clients=clients, seed=seed, period=10.0),
        Tiers(clients=clients, seed=seed, tiers=TIERS, exact=False),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_a_client_keeps_its_device_when_others_come(kind: int) -> None:
    small, large = families(CLIENTS, 5)[kind], families(tuple(str(i) for i in range(99, -1, -1)), 5)[kind]
    assert [small.profile(c) for c in CLIENTS] == [large.profile(c) for c in CLIENTS]
    if kind:
        other = families(CLIENTS, 6)[kind]
        assert [small.profile(c) for c in CLIENTS] != [other.profile(c) for c in CLIENTS]


@pytest.mark.parametrize(("number", "counts"), [(10, (2, 5, 3)), (100, (20, 50, 30)), (7, (1, 4, 2)), (1, (0, 1, 0))])
def test_tiers_have_their_shares_to_the_client(number: int, counts: tuple[int, ...]) -> None:
    # 7 clients: quotas 1.4, 3.5, 2.1, so the second tier gets the client that is left
    clients = tuple(str(i) for i in range(number))
    family = Tiers(clients=clients, seed=0, tiers=TIERS)
    found = Counter(family.profile(client).speed for client in clients)
    assert tuple(found[speed] for speed in (4.0, 1.0, 0.25)) == counts


def test_tiers_are_dealt_by_hash_and_on_average_without_exact() -> None:
    clients = tuple(str(i) for i in range(3000))
    made = [Tiers(clients=clients, seed=seed, tiers=TIERS) for seed in (0, 0, 1)]
    dealt = [[family.profile(c).speed for c in clients] for family in made]
    assert dealt[0] == dealt[1] != dealt[2]
    turned = Tiers(clients=clients[::-1], seed=0, tiers=TIERS)
    assert [turned.profile(c).speed for c in clients] == dealt[0]
    loose = Tiers(clients=clients, seed=0, tiers=TIERS, exact=False)
    share = statistics.mean(loose.profile(c).speed == 1.0 for c in clients)
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(3000)


def test_shares_of_tiers_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"devices\.tiers: the shares sum to 0\.9: must be 1"):
        Tiers(clients=CLIENTS, seed=0, tiers=[{"share": 0.5}, {"share": 0.4}])


@pytest.mark.parametrize(
    "tiers", ["[]", "fast", "[3]", "[{speed: 1.0}]", "[{share: 1, speed: -1}]", "[{share: 1, x: 1}]"]
)
def test_wrong_tiers_are_refused_by_the_rule_beside_them(tiers: str) -> None:
    with pytest.raises(ConfigError, match=r"^devices\.tiers"):
        composed(["devices=tiers", f"devices.tiers={tiers}"])


# --- traces


def trace(tmp_path: Path, text: str, clients: tuple[str, ...] = ("0", "1"), **more: Any) -> Trace:
    path = tmp_path / "devices.csv"
    path.write_text(text, encoding="utf-8")
    return Trace(clients=clients, seed=0, path=str(path), **more)


def test_a_trace_gives_what_it_lists_and_defaults_for_the_rest(tmp_path: Path) -> None:
    text = "\ufeffclient, speed,up,period,duty\n1,0.5,inf,60,0.25\n\n0,2,,,\n7,9,9,9,1\n"
    family = trace(tmp_path, text, step_seconds=0.1)
    assert family.profile("1") == DeviceProfile(0.1, speed=0.5, period=60.0, duty=0.25)
    assert family.profile("0") == DeviceProfile(0.1, speed=2.0)


def test_recycling_goes_round_by_position(tmp_path: Path) -> None:
    clients = ("0", "1", "2", "3", "4")
    family = trace(tmp_path, "client,speed\n1,10\n0,20\n", clients, recycle=True)
    assert [family.profile(c).speed for c in clients] == [20, 10, 10, 20, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,sped\n0,1\n1,1\n", r"line 1, column sped: no such column; known: client, speed"),
        ("client,up,up\n0,1,1\n1,1,1\n", r"line 1, column up: is there twice"),
        ("speed\n1\n", r"line 1, column client: is missing"),
        ("", r"line 1, column client: is missing"),
        ("client,speed\n", r"line 2: the file lists no client"),
        (
            "client,speed\n0,1\n",
            r"column client: 1 of the run's clients are missing, '1' first; .*devices\.recycle=true",
        ),
        ("client,speed\n0,1\n1,fast\n", r"line 3, column speed: 'fast' is not a number"),
        ("client,speed\n0,1\n1,-1\n", r"line 3, column speed: -1 must be number > 0"),
        ("client,down\n0,1\n1,nan\n", r"line 3, column down: nan must be number > 0$"),
        ("client,latency\n0,inf\n1,0\n", r"line 2, column latency: inf must be number >= 0"),
        ("client,speed\n0,1\n0,1\n", r"line 3, column client: '0' is repeated"),
        ("client,speed\n,1\n", r"line 2, column client: '' is no client"),
        ("client,speed\n0,1,2\n", r"line 2: has 3 cells, the header has 2"),
        ('client,speed\n0,"1\n', r"cannot be read as CSV"),
    ],
)
def test_a_wrong_trace_is_named_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^devices\.path=.*devices\.csv.*" + message):
        trace(tmp_path, text)


def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(ValueError, match=rf"devices\.path={re.escape(str(path))}: cannot be read as CSV"):
            Trace(clients=CLIENTS, seed=0, path=str(path))
    with pytest.raises(ValueError, match=r"devices\.path=null: must name a CSV file"):
        Trace(clients=CLIENTS, seed=0)
    (tmp_path / "latin.csv").write_bytes(b"client,speed\n\xe9,1\n")
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        Trace(clients=CLIENTS, seed=0, path=str(tmp_path / "latin.csv"))


# --- configuration and documentation


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_is_built(choice: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("client,speed\na,2\n")
    more = [f"devices.path={tmp_path}/t.csv", "devices.recycle=true"] if choice == "trace" else []
    family = build(settings(f"+devices={choice}", *more), at="devices", clients=CLIENTS, seed=0)
    profiles = [family.profile(client) for client in CLIENTS]
    assert all(isinstance(profile, DeviceProfile) for profile in profiles)
    assert (sum(profile.duration(10, 1000, 1000) for profile in profiles) > 0) == (choice != "ideal")


@pytest.mark.parametrize("choice", CHOICES)
def test_the_yaml_says_the_rules_of_the_code_for_every_parameter(choice: str) -> None:
    written = OmegaConf.to_container(OmegaConf.load(CONFIGS / "devices" / f"{choice}.yaml"))
    assert isinstance(written, dict)
    rules = written.pop("_allowed_", {})
    assert rules.keys() == written.keys() - {"_target_"}
    for name in rules.keys() & RULES.keys():
        assert rules[name] == RULES[name] + (" or null" if name == "phase" else ""), name


def test_a_wrong_setting_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"devices\.duty=0: must be number in \(0, 1\]"):
        settings("+devices=lognormal", "devices.duty=0")
    with pytest.raises(ConfigError, match=r"devices\.path=null"):
        build(settings("+devices=trace"), at="devices", clients=CLIENTS, seed=0)


def test_the_documented_examples_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "devices.md").read_text()
    listing, tiers = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("csv", "yaml"))
    assert listing is not None
    assert tiers is not None
    assert len(list(csv.reader(io.StringIO(listing[1])))) == 4
    family = trace(tmp_path, listing[1], ("0", "1", "2"))
    assert family.profile("1") == DeviceProfile(0.01, 0.25, 2e5, 5e4, 0.8, 3600.0, 0.5, 600.0, 0.05)
    assert family.profile("2") == DeviceProfile(0.01, 4.0)
    node = OmegaConf.to_container(OmegaConf.create(tiers[1]))
    assert isinstance(node, dict)
    built = build({str(k): v for k, v in node.items()}, at="devices", clients=CLIENTS, seed=0)
    assert Counter(built.profile(c).speed for c in CLIENTS) == {0.2: 9, 8.0: 1}
