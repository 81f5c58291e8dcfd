//! One YAML document as the JSON value it stands for: of YAML 1.2, but that plain numbers with a leading 0 are octal. So YAML 1.1 has
//! it, and the library in Go that other runtimes read these files with: a mode is written 0640.

use saphyr::{Scalar, ScalarStyle, Yaml, YamlLoader};
use saphyr_parser::Parser;
use serde_json::{Map, Number, Value};

/// Parses `text`. An error for more than one document, and for what JSON has no words for.
pub fn parse(text: &str) -> Result<Value, String> {
    let mut loader = YamlLoader::default();
    loader.early_parse(false);
    Parser::new_from_str(text).load(&mut loader, true).map_err(|error| error.to_string())?;
    if let Some(error) = loader.error() {
        return Err(error.to_string());
    }
    match loader.into_documents().as_slice() {
        [document] => value(document),
        documents => Err(format!("expected one YAML document, found {}", documents.len())),
    }
}

fn value(yaml: &Yaml) -> Result<Value, String> {
    Ok(match yaml {
        Yaml::Representation(text, style, tag) => {
            let octal = (*style == ScalarStyle::Plain && tag.is_none()).then(|| octal(text)).flatten();
            let scalar = octal.map(Scalar::Integer);
            let scalar = scalar.or_else(|| Scalar::parse_from_cow_and_metadata(text.clone(), *style, tag.as_ref()));
            plain(scalar.ok_or_else(|| format!("{text:?} is not what its tag says"))?)?
        }
        Yaml::Value(scalar) => plain(scalar.clone())?,
        Yaml::Sequence(list) => Value::Array(list.iter().map(value).collect::<Result<_, _>>()?),
        Yaml::Mapping(members) => {
            let mut map = Map::new();
            for (key, member) in members {
                let Value::String(key) = value(key)? else { return Err("a key that is no text".to_owned()) };
                // The parser knows them apart by how they are written too.
                if map.insert(key.clone(), value(member)?).is_some() {
                    return Err(format!("the key {key:?} twice"));
                }
            }
            Value::Object(map)
        }
        Yaml::Tagged(_, inner) => value(inner)?,
        Yaml::Alias(_) | Yaml::BadValue => return Err("a value that cannot be resolved".to_owned()),
    })
}

fn plain(scalar: Scalar) -> Result<Value, String> {
    Ok(match scalar {
        Scalar::Null => Value::Null,
        Scalar::Boolean(truth) => Value::Bool(truth),
        Scalar::Integer(number) => Value::Number(number.into()),
        Scalar::FloatingPoint(number) => Value::Number(Number::from_f64(number.into_inner()).ok_or("a number that is none")?),
        Scalar::String(text) => Value::String(text.into_owned()),
    })
}

/// A number with a leading 0 and octal digits alone.
fn octal(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let is_octal = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
    is_octal.then(|| i64::from_str_radix(digits, 8).ok()).flatten().map(|number| sign * number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values() {
        let text = "# by hand\na: 1\nb: [x, \"2\", true, ~]\nc:\n  - d: 660\n    e: 0o660\n    f: 1.5\n  - {g: /dev/x, 'h': }\n";
        assert_eq!(
            parse(text).unwrap(),
            json!({"a": 1, "b": ["x", "2", true, null], "c": [{"d": 660, "e": 432, "f": 1.5}, {"g": "/dev/x", "h": null}]})
        );
        let text = "[0660, -010, +07, 0, 00, 08, 0x10, '0660', !!str 0660, !!int 12, a0660]";
        assert_eq!(parse(text).unwrap(), json!([432, -8, 7, 0, 0, 8, 16, "0660", "0660", 12, "a0660"]));
    }

    #[test]
    fn wrong_documents() {
        for bad in ["a: 1\n---\nb: 2\n", "a: [1", "1: x", "a: .nan", "", "a: 1\n'a': 2\n"] {
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
