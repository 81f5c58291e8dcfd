//! `-o json`: CRI messages in the protobuf JSON form, which is what crictl prints.

use protobuf::MessageDyn;
use protobuf_json_mapping::PrintOptions;
use serde_json::Value;

use super::failure::{Failure, Outcome};

/// `message` with every field, set or not, so that programs need not guess.
pub fn value(message: &dyn MessageDyn) -> Outcome<Value> {
    let options = PrintOptions { always_output_default_values: true, ..PrintOptions::default() };
    let text = protobuf_json_mapping::print_to_string_with_options(message, &options)
        .map_err(|error| Failure::failed(format!("print answer: {error}")))?;
    serde_json::from_str(&text).map_err(|error| Failure::failed(format!("print answer: {error}")))
}

/// A verbose answer: the strings of its `info` that are JSON themselves become a part of the whole.
pub fn verbose(message: &dyn MessageDyn) -> Outcome<Value> {
    let mut value = value(message)?;
    if let Some(Value::Object(info)) = value.get_mut("info") {
        for entry in info.values_mut() {
            let parsed = entry.as_str().and_then(|text| serde_json::from_str(text).ok());
            if let Some(parsed @ (Value::Object(_) | Value::Array(_))) = parsed {
                *entry = parsed;
            }
        }
    }
    Ok(value)
}

/// The text of `value`, indented, with a newline at the end.
pub fn text(value: &Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{Container, ContainerState, ContainerStatusResponse};

    #[test]
    fn fields_are_named_as_crictl_names_them() {
        let mut container = Container::new();
        container.id = "c1".into();
        container.pod_sandbox_id = "s1".into();
        container.state = ContainerState::CONTAINER_RUNNING.into();
        container.created_at = 1_600_000_000_000_000_000;
        let value = value(&container).unwrap();
        assert_eq!(value["podSandboxId"], "s1");
        assert_eq!(value["state"], "CONTAINER_RUNNING");
        assert_eq!(value["createdAt"], "1600000000000000000");
        assert_eq!(value["imageRef"], "");
    }

    #[test]
    fn info_is_opened() {
        let mut status = ContainerStatusResponse::new();
        status.info.insert("info".into(), r#"{"pid":7}"#.into());
        status.info.insert("note".into(), "plain words".into());
        let value = verbose(&status).unwrap();
        assert_eq!(value["info"]["info"]["pid"], 7);
        assert_eq!(value["info"]["note"], "plain words");
    }
}
