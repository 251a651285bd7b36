"""The Flower ClientApp: an instruction in, an answer out, and nothing else leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..core.config import RunConfig
from ..core.errors import PrivateError, UserError
from ..core.progress import SILENT, Watch
from ..core.wire import Kind
from ..privacy.securesum.identity import load_roster, load_signing_key
from .answering import SiteClient
from .data import SiteData, load_site
from .policy import Policy, load_policy
from .securing import Identity
from .surroundings import Surroundings


def make_client_app(surroundings: Surroundings, watch: Watch = SILENT) -> ClientApp:
    """A ClientApp whose sites are what ``surroundings`` says."""
    return client_app(SiteClient(surroundings, watch).answer)


def client_app(answer: Callable[[Kind, Message, Context], Message]) -> ClientApp:
    """A ClientApp whose sites answer an instruction as ``answer`` does."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return answer("hello", message, context)

    @app.train()
    def local_training(message: Message, context: Context) -> Message:
        return answer("train", message, context)

    @app.query("keys")
    def keys_of_a_secure_sum(message: Message, context: Context) -> Message:
        return answer("keys", message, context)

    @app.query("shares")
    def shares_of_its_secrets(message: Message, context: Context) -> Message:
        return answer("shares", message, context)

    @app.query("agree")
    def agreement_on_survivors(message: Message, context: Context) -> Message:
        return answer("agree", message, context)

    @app.query("reveal")
    def shares_to_unmask(message: Message, context: Context) -> Message:
        return answer("reveal", message, context)

    @app.query("refine")
    def second_pass(message: Message, context: Context) -> Message:
        return answer("refine", message, context)

    @app.evaluate()
    def local_evaluation(message: Message, context: Context) -> Message:
        return answer("evaluate", message, context)

    return app


def own_name(config: RunConfig | None, context: Context) -> str:
    """The site's name from its node configuration: ``site``, or its position among the run's sites."""
    node = context.node_config
    if "site" in node:
        return str(node["site"])
    position, names = node.get("partition-id"), config.site_names if config is not None else ()
    if not isinstance(position, int) or not 0 <= position < len(names):
        raise UserError(f'the node configuration names no site: give site="NAME" or a partition-id below {len(names)}')
    return names[position]


def _own_folder(site: str, context: Context) -> Path:
    folder = context.node_config.get("site-folder")
    if not folder:
        raise UserError(f'site {site}: give site-folder="FOLDER" in the node configuration; the ledger lies there')
    return Path(str(folder))


def _own_policy(folder: Path | None, context: Context) -> Policy:
    chosen = str(context.node_config.get("policy", ""))
    return load_policy(Path(chosen) if chosen or folder is None else folder / "policy.toml")


def _own_data(config: RunConfig, site: str, path: Path, context: Context) -> SiteData:
    given = str(context.node_config.get("data-path", ""))
    if given and Path(given).resolve() != path.resolve():
        raise PrivateError(
            f"site {site}: data-path {given} in the node configuration is not {path}, which the policy names; a job "
            "reads nothing else, so leave data-path out or change the policy"
        )
    return load_site(config, site, str(path))


def _own_identity(config: RunConfig, site: str, folder: Path | None, context: Context) -> Identity:
    def place(key: str, usual: str) -> Path:
        chosen = str(context.node_config.get(key, ""))
        if not chosen and folder is None:
            raise UserError(f'site {site}: give {key}="FILE" in the node configuration, for the secure sum')
        return Path(chosen) if chosen or folder is None else folder / usual

    return Identity(load_signing_key(place("signing-key", "signing.key")), load_roster(place("roster", "roster.toml")))


#: A real site: its name, folder, policy, data, key and roster come from its own node configuration.
DEPLOYED = Surroundings(own_name, _own_folder, _own_policy, _own_data, keeps=True, identity=_own_identity)
app = make_client_app(DEPLOYED)
