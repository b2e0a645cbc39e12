"""TLS: encrypted control, and bytes beside it only where the configuration allows it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.security import Security

from dask_shm_bridge import stats

from . import tasks
from .deployment import MiB, environment, measured

SIZE = 4 * MiB
SMALL = 256 * 1024


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> Security:
    """Make a certificate that signs itself."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dask-shm-bridge test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder: Path = tmp_path_factory.mktemp("tls")
    pem = folder / "both.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    roles = ("client", "scheduler", "worker")
    files = {f"tls_{role}_{kind}": str(pem) for role in roles for kind in ("cert", "key")}
    return Security(tls_ca_file=str(pem), require_encryption=True, **files)


@pytest.fixture(params=["tls", "shm+tls"])
def protocol(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both schemes; for ``tls`` the negotiating comm is in its place, by the preload."""
    from distributed.comm import registry

    import dask_shm_bridge.upgrade

    before = dict(registry.backends)
    dask_shm_bridge.upgrade.install()
    yield str(request.param)
    registry.backends.update(before)


@pytest.mark.parametrize("allowed", [False, True], ids=["not allowed", "allowed"])
def test_the_pool_beside_tls_is_opt_in(
    security: Security,
    protocol: str,
    allowed: bool,
    pool_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        **pool_config,
        "shm-bridge.tls": allowed,
        "distributed.nanny.preload": ["dask_shm_bridge.preload"],
        "distributed.worker.preload": ["dask_shm_bridge.preload"],
    }
    for key, value in environment(config).items():
        monkeypatch.setenv(key, value)
    with (
        dask.config.set(config),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            protocol=protocol,
            security=security,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            local_directory=str(tmp_path),
        ) as cluster,
        Client(cluster, security=security) as client,
    ):
        assert cluster.scheduler_address.startswith(f"{protocol}://")
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        x = tasks.numbers(SIZE, 1)
        with measured(client) as moved:
            task = client.submit(tasks.crc, x, workers=workers[:1], pure=False)
            assert task.result() == tasks.crc(x)
            future = client.scatter(x, hash=False, workers=workers[:1])
            there = client.submit(tasks.fresh, future, workers=workers[1:], pure=False)
            assert (there.result() == x + 1).all()
        if allowed:
            assert moved().everywhere("sent", "inline") < SMALL, moved()
        else:
            assert moved().everywhere("sent", "copied") == 0, moved()
            assert stats()["fallbacks"]["tls"] > 0
