"""What the configuration says to each part, in the part's own terms. Pure: nothing is opened."""

import os

from bridged import open_files
from bridged.addresses import split_address
from bridged.alarms.webhook import Hook
from bridged.backlog.spool import SpoolOptions
from bridged.delivery.delivery import DeliveryOptions
from bridged.delivery.pacing import PaceLimits
from bridged.mixpanel.mapping import MappingSettings
from bridged.mixpanel.requests import Credentials, Target
from bridged.settings import Config
from bridged.sources.http import HttpOptions
from bridged.sources.http_connections import HttpLimits
from bridged.sources.stream import StreamOptions


def mapping_settings(config: Config) -> MappingSettings:
    """What the configuration says about mapping."""
    events, mixpanel = config.events, config.mixpanel
    return MappingSettings(
        token=mixpanel.token,
        partner_id=mixpanel.partner_id,
        naming=mixpanel.naming,
        message_engagement=events.message_engagement,
        customer_behavior=events.customer_behavior,
        include=events.include,
        exclude=events.exclude,
        unknown=events.unknown,
        anonymous=events.anonymous,
        names=events.names,
        transform=events.transform,
    )


def target(config: Config) -> Target:
    """Where the configuration says that requests go, and as whom."""
    mixpanel = config.mixpanel
    credentials = Credentials(
        token=mixpanel.token,
        api_secret=mixpanel.api_secret,
        service_account=mixpanel.service_account,
        service_secret=mixpanel.service_secret,
        project_id=mixpanel.project_id,
    )
    return Target(url=mixpanel.url, region=mixpanel.region, credentials=credentials)


def spool_options(config: Config) -> SpoolOptions:
    """What the configuration says about the spool. SQLite puts its files where a link leads to: so must we."""
    return SpoolOptions(
        path=os.path.realpath(config.spool.path),
        max_bytes=config.spool.max_bytes,
        max_dead_letters=config.spool.max_dead_letters,
        max_segment_events=config.delivery.max_batch_events,
        max_segment_bytes=config.delivery.max_batch_bytes,
    )


def delivery_options(config: Config) -> DeliveryOptions:
    """What the configuration says about delivery, but for the pace."""
    delivery = config.delivery
    return DeliveryOptions(
        max_batch_events=delivery.max_batch_events,
        max_batch_bytes=delivery.max_batch_bytes,
        flush_interval_s=delivery.flush_interval,
        probe_interval_s=delivery.probe_interval,
        max_age_s=config.retention.max_age,
        on_expiry=config.retention.on_expiry,
    )


def pace_limits(config: Config) -> PaceLimits:
    """What the configuration says about the pace."""
    delivery = config.delivery
    return PaceLimits(
        max_events_per_second=delivery.max_events_per_second,
        max_bytes_per_minute=delivery.max_bytes_per_minute,
        max_concurrency=delivery.max_concurrency,
    )


def http_options(config: Config) -> HttpOptions:
    """What the configuration says about the HTTP door."""
    http = config.sources.http
    host, port = split_address(http.listen)
    return HttpOptions(
        host=host,
        port=port,
        bearer_token=http.bearer_token,
        max_body=int(http.max_body),  # as a number of bytes in what is said of it
        tls_cert=http.tls_cert,
        tls_key=http.tls_key,
        limits=HttpLimits(
            max_connections=open_files.connections(config).http,
            max_connections_per_client=http.max_connections_per_client,
            max_in_flight=http.max_in_flight,
        ),
    )


def stream_options(config: Config) -> StreamOptions:
    """What the configuration says about the stream door."""
    stream = config.sources.stream
    return StreamOptions(
        listen=stream.listen,
        max_line=stream.max_line,
        max_connections=open_files.connections(config).stream,
        max_connections_per_client=stream.max_connections_per_client,
        max_unfinished=stream.max_unfinished,
        tls_cert=stream.tls_cert,
        tls_key=stream.tls_key,
    )


def hook(config: Config) -> Hook:
    """Where alarms are posted."""
    return Hook(config.alerts.webhook_url, config.alerts.webhook_token)
