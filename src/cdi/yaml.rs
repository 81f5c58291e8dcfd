//! One YAML document as the JSON value it stands for.

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Number, Value};

/// Parses `text`. An error for more than one document, and for what JSON has no words for.
pub fn parse(text: &str) -> Result<Value, String> {
    let documents = Yaml::load_from_str(text).map_err(|error| error.to_string())?;
    match documents.as_slice() {
        [document] => value(document),
        documents => Err(format!("expected one YAML document, found {}", documents.len())),
    }
}

fn value(yaml: &Yaml) -> Result<Value, String> {
    Ok(match yaml {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(truth)) => Value::Bool(*truth),
        Yaml::Value(Scalar::Integer(number)) => Value::Number((*number).into()),
        Yaml::Value(Scalar::FloatingPoint(number)) => Value::Number(Number::from_f64(number.into_inner()).ok_or("a number that is none")?),
        Yaml::Value(Scalar::String(text)) => Value::String(text.to_string()),
        Yaml::Sequence(list) => Value::Array(list.iter().map(value).collect::<Result<_, _>>()?),
        Yaml::Mapping(members) => {
            let mut map = Map::new();
            for (key, member) in members {
                let key = key.as_str().ok_or("a key that is no text")?;
                map.insert(key.to_owned(), value(member)?);
            }
            Value::Object(map)
        }
        Yaml::Tagged(_, inner) => value(inner)?,
        Yaml::Representation(..) | Yaml::Alias(_) | Yaml::BadValue => return Err("a value that cannot be resolved".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values() {
        let text = "# by hand\na: 1\nb: [x, \"2\", true, ~]\nc:\n  - d: 0660\n    e: 0o660\n    f: 1.5\n  - {g: /dev/x}\n";
        assert_eq!(
            parse(text).unwrap(),
            json!({"a": 1, "b": ["x", "2", true, null], "c": [{"d": 660, "e": 432, "f": 1.5}, {"g": "/dev/x"}]})
        );
    }

    #[test]
    fn wrong_documents() {
        for bad in ["a: 1\n---\nb: 2\n", "a: [1", "1: x", "a: .nan", ""] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let inner = vec![format!("*a{}", n - 1); 9].join(", ");
            bomb += &format!("a{n}: &a{n} [{inner}]\n");
        }
        assert!(parse(&bomb).is_err());
    }
}
