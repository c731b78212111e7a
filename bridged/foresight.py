"""What will hurt later, said at the start."""

import structlog

from bridged import certificates, options
from bridged.config import has_credential
from bridged.connections import unusable_authorities
from bridged.mixpanel.requests import API_SECRET_RETIRED
from bridged.settings import Config

log = structlog.get_logger()


def warn(config: Config) -> None:
    """Into the log."""
    for warning in certificates.warnings(config):
        log.warning("certificate", problem=warning)
    for warning in unusable_authorities():
        log.warning("authorities_unusable", problem=warning)
    if config.mixpanel.export and not has_credential(config):
        log.warning("not_set_up", hint=f"give Mixpanel's credential on the page, http://{config.admin.listen}/")
    if options.target(config).credentials.kind == "API secret":
        log.warning("api_secret_retires", on=API_SECRET_RETIRED, hint="create a service account, set service_account")
    if config.mixpanel.export and not config.mixpanel.token:
        log.warning("no_project_token", hint="events carry no `token`, as Braze's connector's do: set mixpanel.token")
