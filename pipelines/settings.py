"""Where the commands for a cluster take their settings from: the environment, said once for code and `--help`."""

from __future__ import annotations

import os
from collections.abc import Mapping

ENVIRONMENT = """\
environment:
  KFP_ENDPOINT                 the API (default of --host), also KF_PIPELINES_ENDPOINT
  KF_PIPELINES_UI_ENDPOINT     the UI, for the links that are printed, where it is another host
  KFP_NAMESPACE                the profile's namespace in multi-user mode (default of --namespace)
  KFP_EXPERIMENT, KFP_SERVICE_ACCOUNT, KFP_PIPELINE_ROOT    defaults of the options of that name
  KFP_TOKEN                    bearer token, also KFP_EXISTING_TOKEN
  KFP_TOKEN_FILE               file with the token, read again for every call, also KF_PIPELINES_SA_TOKEN_PATH
                               (default: /var/run/secrets/kubeflow/pipelines/token where that is mounted)
  KFP_COOKIE                   session cookie of Dex, oauth2-proxy or the like, as `name=value; name=value`
  KFP_CA_CERT                  CA bundle to trust, also REQUESTS_CA_BUNDLE and SSL_CERT_FILE
  HTTPS_PROXY, NO_PROXY        as usual
"""


def setting(*names: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The first of these variables that is set and not empty, stripped."""
    return next((text for name in names if (text := environment.get(name, "").strip())), None)
