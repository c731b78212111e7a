"""Who may write. Pure.

Basic authentication in three forms: a service account with its secret (and `project_id` in the query), a project's
token with an empty password, or its API secret with an empty password, both without `project_id`: they name the project
themselves. The pair may come unencoded, as the service bears that too.
"""

import base64
import binascii

import msgspec


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is accepted. Without a token, a secret or an account any well-formed credential is."""

    token: str = ""
    api_secret: str = ""
    service_account: str = ""
    service_secret: str = ""
    project_id: str = ""

    @property
    def closed(self) -> bool:
        """Whether a credential has to be one of these."""
        return bool(self.token or self.api_secret or self.service_account)

    def accepts(self, authorization: str, project_id: str) -> bool:
        """Whether the value of an Authorization header, with the query's `project_id`, opens the project."""
        user, password = _basic(authorization)
        if not user:
            return False
        if project_id and self.project_id and project_id != self.project_id:
            return False
        # Only a service account has a password, and it may belong to many projects: it has to say which, and nobody else may.
        if bool(password) != bool(project_id):
            return False
        if not self.closed:
            return True
        if not password:
            return user in {self.token, self.api_secret}
        return (user, password) == (self.service_account, self.service_secret)


def _basic(authorization: str) -> tuple[str, str]:
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() != "basic" or not value:
        return "", ""
    if ":" not in value:
        try:
            value = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            return "", ""
    user, _, password = value.partition(":")
    return user, password
