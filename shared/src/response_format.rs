//! What form a text must have: OpenAI's `response_format`, and two more that other servers have too.

use serde_json::{Map, Value};

use crate::outcome::{JobError, code};

/// A job's `responseFormat`, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum ResponseFormat {
    /// `{"type": "text"}`: any.
    Text,
    /// `{"type": "json_object"}`: a JSON object.
    JsonObject,
    /// `{"type": "json_schema", "json_schema": {"name": …, "schema": …, "strict": …}}`: JSON that fits the schema.
    JsonSchema(Map<String, Value>),
    /// `{"type": "regex", "regex": …}`: what the expression matches as a whole.
    Regex(String),
    /// `{"type": "grammar", "grammar": …}`: a text of the grammar, in Lark's syntax.
    Grammar(String),
}

impl ResponseFormat {
    /// Reads it; an error names the field. Whether a schema makes sense is for the engine to say.
    pub fn parse(value: &Value) -> Result<Self, JobError> {
        let Some(format) = value.as_object() else { return refused("", "must be an object") };
        match format.get("type").and_then(Value::as_str) {
            Some("text") => Ok(Self::Text),
            Some("json_object") => Ok(Self::JsonObject),
            Some("json_schema") => json_schema(format.get("json_schema")),
            Some("regex") => text(format, "regex").map(Self::Regex),
            Some("grammar") => text(format, "grammar").map(Self::Grammar),
            _ => refused(".type", "must be text, json_object, json_schema, regex or grammar"),
        }
    }
}

fn json_schema(value: Option<&Value>) -> Result<ResponseFormat, JobError> {
    let Some(json_schema) = value.and_then(Value::as_object) else {
        return refused(".json_schema", "must be an object");
    };
    if json_schema.get("name").is_some_and(|name| !name.is_string()) {
        return refused(".json_schema.name", "must be a string");
    }
    // Strict or not, the schema is kept to.
    if json_schema.get("strict").is_some_and(|strict| !strict.is_boolean() && !strict.is_null()) {
        return refused(".json_schema.strict", "must be true or false");
    }
    match json_schema.get("schema").and_then(Value::as_object) {
        Some(schema) => Ok(ResponseFormat::JsonSchema(schema.clone())),
        None => refused(".json_schema.schema", "must be an object"),
    }
}

fn text(format: &Map<String, Value>, field: &str) -> Result<String, JobError> {
    match format.get(field).and_then(Value::as_str) {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => refused(&format!(".{field}"), "must be a text that is not empty"),
    }
}

fn refused<T>(field: &str, what: &str) -> Result<T, JobError> {
    let message = format!("responseFormat{field} {what}");
    Err(JobError::field(code::INVALID_REQUEST, format!("options.responseFormat{field}"), message))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn forms_are_read() {
        let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
        for (value, format) in [
            (json!({ "type": "text" }), ResponseFormat::Text),
            (json!({ "type": "json_object" }), ResponseFormat::JsonObject),
            (
                json!({ "type": "json_schema", "json_schema": { "name": "n", "strict": true, "schema": schema } }),
                ResponseFormat::JsonSchema(schema.as_object().unwrap().clone()),
            ),
            (json!({ "type": "regex", "regex": "a+" }), ResponseFormat::Regex("a+".into())),
            (json!({ "type": "grammar", "grammar": "start: A" }), ResponseFormat::Grammar("start: A".into())),
        ] {
            assert_eq!(ResponseFormat::parse(&value).unwrap(), format);
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (value, field) in [
            (json!("json_object"), ""),
            (json!({}), ".type"),
            (json!({ "type": "xml" }), ".type"),
            (json!({ "type": "json_schema" }), ".json_schema"),
            (json!({ "type": "json_schema", "json_schema": { "name": "n" } }), ".json_schema.schema"),
            (json!({ "type": "json_schema", "json_schema": { "schema": [] } }), ".json_schema.schema"),
            (
                json!({ "type": "json_schema", "json_schema": { "schema": {}, "name": 1 } }),
                ".json_schema.name",
            ),
            (
                json!({ "type": "json_schema", "json_schema": { "schema": {}, "strict": 1 } }),
                ".json_schema.strict",
            ),
            (json!({ "type": "regex" }), ".regex"),
            (json!({ "type": "regex", "regex": "" }), ".regex"),
            (json!({ "type": "grammar", "grammar": ["start: A"] }), ".grammar"),
        ] {
            let error = ResponseFormat::parse(&value).unwrap_err();
            assert_eq!(error.param, Some(format!("options.responseFormat{field}")), "{value}");
            assert!(error.message.starts_with(&format!("responseFormat{field} must")), "{error}");
        }
    }
}
