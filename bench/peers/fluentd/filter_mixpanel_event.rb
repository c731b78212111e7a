# The mapping that a user would write for Fluentd: a filter of their own, since record_transformer can't rename what it
# doesn't know by name, and costs more. names.json is the user's table of event names.
require "json"
require "fluent/plugin/filter"

module Fluent::Plugin
  class MixpanelEventFilter < Filter
    Fluent::Plugin.register_filter("mixpanel_event", self)

    config_param :names, :string
    config_param :token, :string

    PREFIXES = {
      "custom_properties" => "[Custom event property] ",
      "purchase_properties" => "[Purchase property] ",
    }.freeze
    RENAMED = { "content_card_id" => "card_id", "product_id" => "productId" }.freeze

    def configure(conf)
      super
      @table = JSON.parse(File.read(@names)).freeze
    end

    def filter(_tag, _time, event)
      user = event["user"]
      kind = event["event_type"]
      properties = {
        "token" => @token,
        "distinct_id" => user["external_user_id"],
        "time" => event["time"],
        "$insert_id" => event["id"],
        "$partner_id" => "braze",
        "ip" => 0,
      }
      device = user["device_id"]
      properties["device_id"] = device if device
      event["properties"].each do |key, value|
        if (prefix = PREFIXES[key])
          value.each { |own, its| properties[prefix + own] = its }
        elsif !value.nil?
          properties[RENAMED[key] || key] = value
        end
      end
      name = @table[kind] || kind
      name = "[Braze Custom Event] #{properties.delete("name")}" if kind == "users.behaviors.CustomEvent"
      { "event" => name, "properties" => properties }
    end
  end
end
