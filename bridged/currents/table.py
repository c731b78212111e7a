"""Every Currents event type that has a Mixpanel form: pure data, one row per type.

A row says what Braze calls the event, what Mixpanel gets to see, and which properties Braze documents for it. Property
names in rows are Braze's; `SEED_PROPERTY_NAMES` and `CURRENT_PROPERTY_NAMES` hold the few that Mixpanel spells its way.

Two things stand outside the rows because all events share them: `user.device_id` is forwarded as `device_id`, and what
the customer's own code adds (`custom_properties`, `purchase_properties`, the `name` of a custom event) gets a prefix.

To add a type: add a row, and its sample in tests/samples. To add a property: name it in its rows and give it a type.
A slip (a name twice, a property without a type) stops the import with an error that names the row.
"""

from typing import Final, Literal

import msgspec

Group = Literal["message_engagement", "customer_behavior"]
PropertyType = Literal["string", "boolean", "int", "float", "array<string>"]


class EventType(msgspec.Struct, frozen=True, kw_only=True):
    """One Currents event type and its Mixpanel form."""

    event_type: str
    # The newest name. Braze calls several LINE and RCS events just "Send" or "Click": here they carry their channel.
    name: str
    group: Group
    # What Braze sends in `properties`, by Braze's names; without what the customer's own code adds.
    properties: tuple[str, ...] = ()
    # The name in the spelling of `naming = "seed"`; None for the types that came later and have one spelling.
    seed_name: str | None = None
    # Which kind of customer-made properties the event carries besides.
    custom: Literal["", "event", "purchase"] = ""
    # What isn't certain about the row.
    note: str = ""


# Where Braze puts the properties of the customer's own.
CUSTOM_MEMBERS: Final = {"event": "custom_properties", "purchase": "purchase_properties"}
# What customer-made names begin with.
CUSTOM_EVENT_PREFIX: Final = "[Braze Custom Event] "
CUSTOM_PROPERTY_PREFIX: Final = "[Custom event property] "
PURCHASE_PROPERTY_PREFIX: Final = "[Purchase property] "

# Braze's property name -> Mixpanel's, where they differ. The seed spelling holds for rows with a `seed_name` only.
SEED_PROPERTY_NAMES: Final[dict[str, str]] = {"content_card_id": "card_id", "product_id": "productId"}
CURRENT_PROPERTY_NAMES: Final[dict[str, str]] = {
    "content_card_id": "card_id",
    "device_model": "$device",
    "os_version": "$os",
}

# Events that Mixpanel doesn't count towards monthly tracked users, by Mixpanel's spelling: no naming yields
# "SMS Send to Carrier" by itself ("SMS Send To Carrier", "SMS Carrier Send"), so whoever wants it exempt renames it.
MTU_EXEMPT: Final[frozenset[str]] = frozenset(
    {
        "Canvas Entry",
        "Email Bounce",
        "Email Delivery",
        "Email Mark As Spam",
        "Email Send",
        "Email Soft Bounce",
        "Email Unsubscribe",
        "Push Notification Bounce",
        "Push Notification Send",
        "SMS Delivery",
        "SMS Delivery Failure",
        "SMS Rejection",
        "SMS Send",
        "SMS Send to Carrier",
        "Webhook Send",
    }
)


def _names(*parts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in `parts`, each of which is a bundle or a string of names."""
    return tuple(name for part in parts for name in (part.split() if isinstance(part, str) else part))


# One type per property name, whatever the event.
_STRINGS: Final = _names(
    # campaign, Canvas, send
    "campaign_id campaign_name message_variation_id message_variation_name",
    "canvas_id canvas_name canvas_variation_id canvas_variation_name canvas_step_id canvas_step_name",
    "canvas_entry_id canvas_step_message_variation_api_id canvas_step_message_variation_id next_step_id",
    "exit_reason progression_type experiment_step_id experiment_split_id experiment_split_name",
    "combination_token content_optimizer_step_id conversion_behavior feature_flag_id_name",
    "send_id dispatch_id message_extras locale_key abort_type abort_log retry_type retry_log",
    # app, device, session, purchase
    "app_group_id app_id platform device_model os_version ad_id ad_id_type session_id source",
    "browser carrier country gender language resolution sdk_version currency product_id",
    # on screen
    "banner_placement_id button_action_type button_id button_string card_id content_card_id",
    # push and Live Activity
    "push_token push_token_device_id push_token_state_change_type push_to_start_token update_token",
    "web_push_token_public_key web_push_token_user_auth web_push_token_vapid_public_key",
    "activity_id activity_attributes_type live_activity_event_outcome live_activity_event_type",
    # email
    "email_address esp from_domain ip_pool sending_ip recipient_domain bounce_reason deferral_reason",
    "user_agent device_class device_os mailbox_provider machine_open url link_id link_alias",
    # subscriptions
    "subscription_group_id subscription_status state_change_source channel channel_identifier",
    # SMS, RCS, WhatsApp, LINE
    "phone_number from_phone_number to_phone_number inbound_phone_number user_phone_number",
    "from_rcs_sender to_rcs_sender bsuid native_line_id line_channel_id line_channel_name",
    "message_body message_id media_id action category short_url in_reply_to quick_reply_text",
    "error provider_error_code provider_error_title element_label element_type interaction_type",
    "template_name flow_id flow_response_json catalog_id",
    # webhook
    "endpoint_url host url_path raw_response webhook_failure_source",
)
_BOOLEANS: Final = _names(
    "ad_tracking_enabled in_control_group is_canvas_entry is_unique is_terminal is_sms_fallback is_amp is_drop",
    "is_suspected_bot_click has_url_parameters link_aliasing_enabled",
    "push_token_foreground_push_disabled push_token_provisionally_opted_in",
)
_INTS: Final = _names(
    "conversion_behavior_index send_time attempt_count ios_push_token_apns_gateway",
    "time_ms push_token_created_at push_token_updated_at",
    "content_length http_status_code retry_count webhook_duration",
)
_FLOATS: Final = _names("price duration latitude longitude ll_accuracy altitude alt_accuracy")
_STRING_ARRAYS: Final = _names("media_urls suspected_bot_click_reason")

PROPERTY_TYPES: Final[dict[str, PropertyType]] = {
    **dict.fromkeys(_STRINGS, "string"),
    **dict.fromkeys(_BOOLEANS, "boolean"),
    **dict.fromkeys(_INTS, "int"),
    **dict.fromkeys(_FLOATS, "float"),
    **dict.fromkeys(_STRING_ARRAYS, "array<string>"),
}

# Bundles of properties that rows share.
WORKSPACE: Final = _names("app_group_id")
CAMPAIGN: Final = _names("campaign_id campaign_name message_variation_id message_variation_name")
CANVAS: Final = _names(
    "canvas_id canvas_name canvas_variation_id canvas_variation_name canvas_step_id canvas_step_name"
)
MESSAGE: Final = CAMPAIGN + CANVAS + WORKSPACE
SEND: Final = _names("send_id dispatch_id")
ABORT: Final = _names("abort_type abort_log")
RETRY: Final = _names("retry_type retry_log")
CONVERSION: Final = _names("conversion_behavior conversion_behavior_index")
EXPERIMENT: Final = _names("experiment_step_id experiment_split_id experiment_split_name")

APP: Final = _names("app_id")
DEVICE: Final = _names("platform os_version device_model")
AD: Final = _names("ad_id ad_id_type ad_tracking_enabled")
NEWS_FEED: Final = APP + DEVICE
SESSION: Final = _names("session_id", WORKSPACE, APP, DEVICE)
SDK: Final = WORKSPACE + APP + DEVICE + AD
ON_SCREEN: Final = MESSAGE + APP + DEVICE
BANNER: Final = _names(ON_SCREEN, AD, "banner_placement_id canvas_step_message_variation_api_id browser")
IN_APP: Final = ON_SCREEN + SEND + AD
CARD: Final = _names(IN_APP, "content_card_id is_unique")
PUSH: Final = _names(MESSAGE, SEND, APP, "platform")

EMAIL: Final = _names(MESSAGE, SEND, "email_address ip_pool")
EMAIL_RESULT: Final = _names(EMAIL, "esp from_domain")
EMAIL_READER: Final = _names("user_agent browser device_class device_os device_model mailbox_provider is_amp")
LINK: Final = _names("url link_id link_alias link_aliasing_enabled has_url_parameters")
SHORT_LINK: Final = _names("url short_url user_agent")
BOT_CLICK: Final = _names("is_suspected_bot_click suspected_bot_click_reason")

PHONE: Final = _names(MESSAGE, "subscription_group_id")
SMS: Final = _names(PHONE, SEND, "to_phone_number")
SMS_ERROR: Final = _names("error provider_error_code is_sms_fallback")
INBOUND: Final = _names("action message_body media_urls user_phone_number")
RCS: Final = _names(SMS, "from_rcs_sender")
WHATSAPP: Final = _names(SMS, "from_phone_number bsuid message_id template_name flow_id")
WHATSAPP_UNSENT: Final = _names(PHONE, "dispatch_id to_phone_number bsuid")
LINE: Final = _names(
    "campaign_id campaign_name message_variation_id canvas_id canvas_variation_id canvas_step_id canvas_step_name",
    *(WORKSPACE, SEND, "subscription_group_id line_channel_id line_channel_name native_line_id"),
)

SUBSCRIPTION: Final = _names("subscription_status state_change_source channel channel_identifier email_address")
TOKEN_CHANGE: Final = _names(WORKSPACE, APP, "push_token_state_change_type ios_push_token_apns_gateway")
WEB_PUSH: Final = _names("web_push_token_public_key web_push_token_user_auth web_push_token_vapid_public_key")
PUSH_TOKEN: Final = _names(
    "push_token push_token_device_id push_token_created_at push_token_updated_at",
    "push_token_foreground_push_disabled push_token_provisionally_opted_in",
    WEB_PUSH,
)
LIVE_ACTIVITY: Final = _names(
    "activity_id activity_attributes_type live_activity_event_type push_to_start_token update_token", WORKSPACE, APP
)
WEBHOOK_CALL: Final = _names("endpoint_url host url_path http_status_code content_length raw_response")
WEBHOOK_FAILURE: Final = _names(WEBHOOK_CALL, "webhook_failure_source webhook_duration retry_count is_terminal")
WHATSAPP_REPLY: Final = _names(
    "inbound_phone_number bsuid message_id in_reply_to quick_reply_text",
    "flow_id flow_response_json catalog_id product_id",
)

ENGAGEMENT: Final = "message_engagement"
BEHAVIOR: Final = "customer_behavior"
NAME_GUESSED: Final = "the Mixpanel name isn't published: it follows the pattern of its neighbours"
FIELDS_UNKNOWN: Final = "the properties aren't published yet"


def _seed(
    event_type: str,
    name: str,
    *properties: str | tuple[str, ...],
    group: Group = ENGAGEMENT,
    seed_name: str | None = None,
    custom: Literal["", "event", "purchase"] = "",
) -> EventType:
    """A type that both namings know, under one name unless `seed_name` says otherwise."""
    return EventType(
        event_type=event_type,
        name=name,
        group=group,
        properties=_names(*properties),
        seed_name=seed_name or name,
        custom=custom,
    )


def _later(
    event_type: str, name: str, *properties: str | tuple[str, ...], group: Group = ENGAGEMENT, note: str = ""
) -> EventType:
    """A type that came later: one spelling, whatever the naming."""
    return EventType(event_type=event_type, name=name, group=group, properties=_names(*properties), note=note)


# fmt: off
EVENT_TYPES: Final[tuple[EventType, ...]] = (
    # What people do
    _seed("users.behaviors.CustomEvent", CUSTOM_EVENT_PREFIX.rstrip(), SDK, group=BEHAVIOR, custom="event"),
    _seed("users.behaviors.Purchase", "Purchase", "product_id price currency", SDK, group=BEHAVIOR, custom="purchase"),
    _seed("users.behaviors.app.FirstSession", "First Session", SESSION, group=BEHAVIOR),
    _seed("users.behaviors.app.SessionStart", "Session Start", SESSION, group=BEHAVIOR),
    _seed("users.behaviors.app.SessionEnd", "Session End", "duration", SESSION, group=BEHAVIOR),
    _seed("users.behaviors.app.NewsFeedImpression", "News Feed Impression", NEWS_FEED, group=BEHAVIOR),
    _seed("users.behaviors.Location", "Location",
        "latitude longitude ll_accuracy altitude alt_accuracy", SDK, group=BEHAVIOR),
    _seed("users.behaviors.InstallAttribution", "Install Attribution", "source", WORKSPACE, group=BEHAVIOR),
    _seed("users.behaviors.Uninstall", "Uninstall", WORKSPACE, APP, group=BEHAVIOR),
    # Subscriptions and tokens
    _later("users.behaviors.subscription.GlobalStateChange", "Global Subscription State Change",
        SUBSCRIPTION, MESSAGE, "send_id", APP),
    _seed("users.behaviors.subscriptiongroup.StateChange", "Subscription Group State Change",
        "subscription_group_id", SUBSCRIPTION, "phone_number", MESSAGE, SEND, APP),
    _later("users.behaviors.liveactivity.PushToStartTokenChange", "Live Activity Push To Start Token Change",
        TOKEN_CHANGE, "activity_attributes_type push_to_start_token", group=BEHAVIOR),
    _later("users.behaviors.liveactivity.UpdateTokenChange", "Live Activity Update Token Change",
        TOKEN_CHANGE, "activity_id update_token", group=BEHAVIOR),
    _later("users.behaviors.pushnotification.TokenStateChange", "Push Notification Token State Change",
        TOKEN_CHANGE, PUSH_TOKEN, "platform time_ms", group=BEHAVIOR),
    # Campaigns
    _seed("users.campaigns.Conversion", "Campaign Conversion",
        CONVERSION, CAMPAIGN, SEND, WORKSPACE, APP, seed_name="Campaign Conversion Event"),
    _seed("users.campaigns.EnrollInControl", "Campaign Control Group Enrollment", CAMPAIGN, SEND, WORKSPACE, APP),
    _later("users.campaigns.Abort", "Campaign Abort", ABORT, CAMPAIGN, "canvas_id", SEND, WORKSPACE, note=NAME_GUESSED),
    # Canvas
    _seed("users.canvas.Entry", "Canvas Entry", CANVAS, "in_control_group", WORKSPACE),
    _seed("users.canvas.Conversion", "Canvas Conversion",
        CONVERSION, CANVAS, WORKSPACE, APP, seed_name="Canvas Conversion Event"),
    _later("users.canvas.Abort", "Canvas Abort",
        ABORT, CANVAS, "canvas_step_message_variation_id", WORKSPACE, note=NAME_GUESSED),
    _later("users.canvas.exit.MatchedAudience", "Exit Match Audience", CANVAS, WORKSPACE),
    _later("users.canvas.exit.PerformedEvent", "Exit Perform Event", CANVAS, WORKSPACE),
    _later("users.canvas.experimentstep.SplitEntry", "Experiment Split Entry", EXPERIMENT, CANVAS, "in_control_group"),
    _later("users.canvas.experimentstep.Conversion", "Experiment Step Conversion", EXPERIMENT, CONVERSION, CANVAS, APP),
    _later("users.canvasstep.Progression", "Canvas Step Progression",
        CANVAS, "canvas_entry_id is_canvas_entry next_step_id progression_type exit_reason", WORKSPACE),
    _later("users.canvas.costep.Send", "Canvas Content Optimizer Step Send",
        "content_optimizer_step_id combination_token channel canvas_variation_id dispatch_id", WORKSPACE),
    _later("users.canvas.costep.Conversion", "Canvas Content Optimizer Step Conversion", note=FIELDS_UNKNOWN),
    # Email
    _seed("users.messages.email.Send", "Email Send", EMAIL, "message_extras"),
    _seed("users.messages.email.Delivery", "Email Delivery", EMAIL_RESULT, "sending_ip send_time"),
    _seed("users.messages.email.Open", "Email Open", EMAIL_RESULT, EMAIL_READER, "machine_open send_time"),
    _seed("users.messages.email.Click", "Email Click", EMAIL_RESULT, EMAIL_READER, LINK, BOT_CLICK, "send_time"),
    _seed("users.messages.email.Bounce", "Email Bounce", EMAIL_RESULT, "bounce_reason is_drop sending_ip send_time"),
    _seed("users.messages.email.SoftBounce", "Email Soft Bounce", EMAIL_RESULT, "bounce_reason sending_ip send_time"),
    _seed("users.messages.email.MarkAsSpam", "Email Mark As Spam", EMAIL_RESULT, "user_agent send_time"),
    _seed("users.messages.email.Unsubscribe", "Email Unsubscribe", EMAIL),
    _later("users.messages.email.Deferral", "Email Deferral",
        EMAIL_RESULT, "deferral_reason attempt_count recipient_domain sending_ip send_time"),
    _later("users.messages.email.Abort", "Email Abort", EMAIL, ABORT, "message_extras"),
    _later("users.messages.email.Retry", "Email Retry", EMAIL, RETRY),
    # Push
    _seed("users.messages.pushnotification.Send", "Push Notification Send",
        PUSH, AD, "push_token locale_key message_extras"),
    _seed("users.messages.pushnotification.Open", "Push Notification Open", IN_APP, "button_action_type button_string"),
    _seed("users.messages.pushnotification.IosForeground", "Push Notification iOS Foreground Open", IN_APP),
    _seed("users.messages.pushnotification.Bounce", "Push Notification Bounce", PUSH, AD, "push_token"),
    _later("users.messages.pushnotification.Abort", "Push Notification Abort", PUSH, ABORT),
    _later("users.messages.pushnotification.Retry", "Push Notification Retry", PUSH, RETRY),
    _later("users.messages.liveactivity.Send", "Live Activity Send", LIVE_ACTIVITY),
    _later("users.messages.liveactivity.Outcome", "Live Activity Outcome",
        LIVE_ACTIVITY, "live_activity_event_outcome"),
    # On screen: in-app messages, Content Cards, banners, feature flags, News Feed
    _seed("users.messages.inappmessage.Impression", "In-App Message Impression",
        IN_APP, "card_id locale_key message_extras"),
    _seed("users.messages.inappmessage.Click", "In-App Message Click", IN_APP, "card_id button_id"),
    _later("users.messages.inappmessage.Abort", "In-App Message Abort", IN_APP, "card_id", ABORT),
    _seed("users.messages.contentcard.Send", "Content Card Send", MESSAGE, SEND, "content_card_id message_extras"),
    _seed("users.messages.contentcard.Impression", "Content Card Impression", CARD),
    _seed("users.messages.contentcard.Click", "Content Card Click", CARD),
    _seed("users.messages.contentcard.Dismiss", "Content Card Dismiss", CARD),
    _later("users.messages.contentcard.Abort", "Content Card Abort", MESSAGE, SEND, ABORT),
    _later("users.messages.banner.Impression", "Banner Impression", BANNER, "is_unique"),
    _later("users.messages.banner.Click", "Banner Click", BANNER, "button_id is_unique"),
    _later("users.messages.banner.Dismiss", "Banner Dismissal",
        BANNER, "button_id is_unique carrier country gender language resolution sdk_version"),
    _later("users.messages.banner.Abort", "Banner Abort", BANNER, ABORT),
    _later("users.messages.featureflag.Impression", "Feature Flag Experiment Impression",
        ON_SCREEN, "feature_flag_id_name browser is_unique"),
    _seed("users.messages.newsfeedcard.Impression", "News Feed Card Impression", NEWS_FEED, "card_id"),
    _seed("users.messages.newsfeedcard.Click", "News Feed Card Click", NEWS_FEED, "card_id"),
    _later("users.messages.newsfeedcard.Abort", "News Feed Card Abort",
        NEWS_FEED, WORKSPACE, "card_id", ABORT, note=NAME_GUESSED),
    # SMS
    _seed("users.messages.sms.Send", "SMS Send", SMS, "category message_extras"),
    _seed("users.messages.sms.CarrierSend", "SMS Carrier Send",
        SMS, "from_phone_number", seed_name="SMS Send To Carrier"),
    _seed("users.messages.sms.Delivery", "SMS Delivery", SMS, "from_phone_number is_sms_fallback"),
    _seed("users.messages.sms.DeliveryFailure", "SMS Delivery Failure", SMS, SMS_ERROR),
    _seed("users.messages.sms.Rejection", "SMS Rejection", SMS, "from_phone_number", SMS_ERROR),
    _seed("users.messages.sms.InboundReceive", "SMS Inbound Received",
        PHONE, INBOUND, "inbound_phone_number", seed_name="SMS Inbound Receipt"),
    _later("users.messages.sms.ShortLinkClick", "SMS Short Link Click",
        MESSAGE, SHORT_LINK, "user_phone_number", BOT_CLICK),
    _later("users.messages.sms.Abort", "SMS Abort", PHONE, ABORT),
    _later("users.messages.sms.Retry", "SMS Retry", PHONE, RETRY),
    # RCS
    _later("users.messages.rcs.Send", "RCS Send", RCS, "category message_extras"),
    _later("users.messages.rcs.Delivery", "RCS Delivery", RCS),
    _later("users.messages.rcs.Read", "RCS Read", MESSAGE, "to_phone_number"),
    _later("users.messages.rcs.Rejection", "RCS Rejection", RCS, SMS_ERROR),
    _later("users.messages.rcs.InboundReceive", "RCS Inbound Received", PHONE, "send_id", INBOUND, "to_rcs_sender"),
    _later("users.messages.rcs.Click", "RCS Click",
        PHONE, "send_id", SHORT_LINK, "user_phone_number element_label element_type interaction_type", BOT_CLICK),
    _later("users.messages.rcs.Abort", "RCS Abort", PHONE, ABORT, note=NAME_GUESSED),
    # WhatsApp
    _later("users.messages.whatsapp.Send", "WhatsApp Send", WHATSAPP, "message_extras"),
    _later("users.messages.whatsapp.Delivery", "WhatsApp Delivery", WHATSAPP),
    _later("users.messages.whatsapp.Read", "WhatsApp Read", WHATSAPP),
    _later("users.messages.whatsapp.Failure", "WhatsApp Failure", WHATSAPP, "provider_error_code provider_error_title"),
    _later("users.messages.whatsapp.InboundReceive", "WhatsApp Inbound Received", PHONE, INBOUND, WHATSAPP_REPLY),
    _later("users.messages.whatsapp.Click", "WhatsApp Tracked Link Click", MESSAGE, SHORT_LINK, "user_phone_number"),
    _later("users.messages.whatsapp.Abort", "WhatsApp Abort", WHATSAPP_UNSENT, ABORT, "message_extras"),
    _later("users.messages.whatsapp.Retry", "WhatsApp Retry", WHATSAPP_UNSENT, RETRY),
    # LINE
    _later("users.messages.line.Send", "LINE Send", LINE, "message_extras"),
    _later("users.messages.line.Click", "LINE Click", LINE, SHORT_LINK, "is_suspected_bot_click"),
    _later("users.messages.line.InboundReceive", "LINE Inbound Receive", LINE, "message_body media_id"),
    _later("users.messages.line.Abort", "LINE Abort", LINE, ABORT, note=NAME_GUESSED),
    _later("users.messages.line.Retry", "LINE Retry", LINE, RETRY),
    # Webhooks
    _seed("users.messages.webhook.Send", "Webhook Send", MESSAGE, SEND, "message_extras"),
    _later("users.messages.webhook.Failure", "Webhook Failure", MESSAGE, SEND, WEBHOOK_FAILURE),
    _later("users.messages.webhook.Abort", "Webhook Abort", MESSAGE, SEND, ABORT, "message_extras"),
    _later("users.messages.webhook.Retry", "Webhook Retry", MESSAGE, SEND, RETRY),
    # Landing pages and surveys
    _later("users.messages.landingpage.Impression", "Landing Page Impression", note=FIELDS_UNKNOWN),
    _later("users.messages.landingpage.Click", "Landing Page Click", note=FIELDS_UNKNOWN),
    _later("users.messages.landingpage.FormSubmission", "Landing Page Form Submission", note=FIELDS_UNKNOWN),
    _later("users.messages.survey.Response", "Survey Response", note=FIELDS_UNKNOWN),
)
# fmt: on


def check(rows: tuple[EventType, ...], property_types: dict[str, PropertyType]) -> None:
    """Raise ValueError, naming the row, for a slip that would show only when events arrive."""
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        names = {"event type": row.event_type, "current name": row.name, "seed name": row.seed_name or row.name}
        for kind, name in names.items():
            if (kind, name) in seen:
                raise ValueError(f"{row.event_type}: the {kind} {name!r} is taken by {seen[kind, name]}")
            seen[kind, name] = row.event_type
        if untyped := [name for name in row.properties if name not in property_types]:
            raise ValueError(f"{row.event_type}: no type for {', '.join(untyped)}")
        for renames in ({}, SEED_PROPERTY_NAMES, CURRENT_PROPERTY_NAMES):
            wire_names = [renames.get(name, name) for name in row.properties]
            if twice := sorted({name for name in wire_names if wire_names.count(name) > 1}):
                raise ValueError(f"{row.event_type}: twice in its properties: {', '.join(twice)}")


check(EVENT_TYPES, PROPERTY_TYPES)
