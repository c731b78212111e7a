// The mapping that a user would write: what both Node programs share. names.json is the user's table of event names.
"use strict";
const fs = require("fs");

const TOKEN = "0123456789abcdef0123456789abcdef";
const NAMES = JSON.parse(fs.readFileSync("names.json"));
const RENAMED = { content_card_id: "card_id", product_id: "productId" };
const PREFIXES = { custom_properties: "[Custom event property] ", purchase_properties: "[Purchase property] " };

function mixpanelEvent(event) {
  const { user, event_type: kind, properties: given } = event;
  let name = NAMES[kind] || kind;
  const properties = {
    token: TOKEN,
    distinct_id: user.external_user_id,
    time: event.time,
    $insert_id: event.id,
    $partner_id: "braze",
    ip: 0,
  };
  if (user.device_id !== undefined) properties.device_id = user.device_id;
  for (const key in given) {
    const value = given[key];
    const prefix = PREFIXES[key];
    if (prefix !== undefined) {
      for (const custom in value) properties[prefix + custom] = value[custom];
    } else if (value !== null) {
      properties[RENAMED[key] || key] = value;
    }
  }
  if (kind === "users.behaviors.CustomEvent") {
    name = "[Braze Custom Event] " + properties.name;
    delete properties.name;
  }
  return { event: name, properties };
}

module.exports = { TOKEN, mixpanelEvent };
