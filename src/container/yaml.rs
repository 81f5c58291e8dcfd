//! A YAML document as the JSON value it stands for.

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// Reads one document. INVALID_ARGUMENT for several, and for what JSON has no words for.
pub(super) fn parse(text: &str) -> Result<Value> {
    let documents = Yaml::load_from_str(text).map_err(|e| Error::invalid(format!("parse YAML: {e}")))?;
    match documents.as_slice() {
        [document] => value(document).ok_or_else(|| Error::invalid("parse YAML: it has tags, or keys that are no text")),
        several => Err(Error::invalid(format!("parse YAML: expected one document, found {}", several.len()))),
    }
}

fn value(yaml: &Yaml) -> Option<Value> {
    Some(match yaml {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(truth)) => Value::Bool(*truth),
        Yaml::Value(Scalar::Integer(number)) => Value::Number((*number).into()),
        Yaml::Value(Scalar::FloatingPoint(number)) => Value::Number(Number::from_f64(number.into_inner())?),
        Yaml::Value(Scalar::String(text)) => Value::String(text.to_string()),
        Yaml::Sequence(list) => Value::Array(list.iter().map(value).collect::<Option<_>>()?),
        Yaml::Mapping(members) => {
            let member = |(key, member): (&Yaml, &Yaml)| Some((key.as_str()?.to_owned(), value(member)?));
            Value::Object(members.iter().map(member).collect::<Option<Map<_, _>>>()?)
        }
        _ => return None,
    })
}
