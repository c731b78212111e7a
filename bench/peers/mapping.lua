-- The mapping that a user would write for Fluent Bit. names.lua is the user's table of event names.
dofile("names.lua")

local PREFIXES = { custom_properties = "[Custom event property] ", purchase_properties = "[Purchase property] " }
local RENAMED = { content_card_id = "card_id", product_id = "productId" }

local function mapped(event)
    local user, kind, properties = event.user, event.event_type, event.properties
    local name = NAMES[kind] or kind
    for member, prefix in pairs(PREFIXES) do
        local own = properties[member]
        if own ~= nil then
            properties[member] = nil
            for key, value in pairs(own) do
                properties[prefix .. key] = value
            end
        end
    end
    for from, to in pairs(RENAMED) do
        if properties[from] ~= nil then
            properties[to], properties[from] = properties[from], nil
        end
    end
    if kind == "users.behaviors.CustomEvent" then
        name = "[Braze Custom Event] " .. properties.name
        properties.name = nil
    end
    properties.token = "0123456789abcdef0123456789abcdef"
    properties.distinct_id = user.external_user_id
    properties.time = event.time
    properties["$insert_id"] = event.id
    properties["$partner_id"] = "braze"
    properties.ip = 0
    properties.device_id = user.device_id
    return { event = name, properties = properties }
end

-- A line is an event.
function mixpanel_event(tag, timestamp, event)
    return 2, timestamp, mapped(event)
end

-- A request of Braze's is one record, and becomes many: an array of events would be taken in one by one, at twice the cost.
function mixpanel_events(tag, timestamp, request)
    local events = request.events
    for at, event in ipairs(events) do
        events[at] = mapped(event)
    end
    return 2, timestamp, events
end
