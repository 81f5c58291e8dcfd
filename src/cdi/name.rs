//! Names of devices: `vendor/class=name`.

use std::fmt;

use crate::api::runtime::ContainerConfig;
use crate::error::{Error, Result};

/// Annotations by which a container asks for devices; what follows is for the one who asks.
const PREFIX: &str = "cdi.k8s.io/";

/// A qualified name that is valid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// A name made of its parts; why it is not valid otherwise.
    pub(super) fn new(kind: &str, device: &str) -> std::result::Result<Name, String> {
        let Some((vendor, class)) = kind.split_once('/') else { return Err(format!("{kind:?} is not vendor/class")) };
        if !is_word(vendor, "_-.") || !vendor.starts_with(|first: char| first.is_ascii_alphabetic()) {
            return Err(format!("{vendor:?} is not the name of a vendor"));
        }
        if !is_word(class, "_-.") || !class.starts_with(|first: char| first.is_ascii_alphabetic()) {
            return Err(format!("{class:?} is not the name of a class"));
        }
        if !is_word(device, "_-.:") {
            return Err(format!("{device:?} is not the name of a device"));
        }
        Ok(Name(format!("{kind}={device}")))
    }

    fn parse(text: &str) -> std::result::Result<Name, String> {
        match text.split_once('=') {
            Some((kind, device)) => Name::new(kind, device),
            None => Err("not of the form vendor/class=name".to_owned()),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Letters and digits at both ends, and `inner` between.
fn is_word(text: &str, inner: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends(bytes.first()) && ends(bytes.last()) && text.chars().all(|c| c.is_ascii_alphanumeric() || inner.contains(c))
}

/// The devices a container asks for, by field and by annotation, each once. INVALID_ARGUMENT for what is no name.
pub fn requested(config: &ContainerConfig) -> Result<Vec<Name>> {
    let mut names = Vec::new();
    let mut take = |field: &str, text: &str| -> Result<()> {
        let name = Name::parse(text).map_err(|why| Error::invalid(format!("{field}: {text:?}: {why}")))?;
        if !names.contains(&name) {
            names.push(name);
        }
        Ok(())
    };
    for device in &config.CDI_devices {
        take("CDI_devices", &device.name)?;
    }
    for (key, value) in config.annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
        for text in value.split(',') {
            take(&format!("annotation {key}"), text)?;
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::CDIDevice;
    use crate::error::Code;

    #[test]
    fn names_of_all_forms() {
        for good in ["vendor.com/gpu=0", "a/b=c", "v_1/c-2=x.y:z", "nvidia.com/gpu=GPU-1:0", "intel.com/sgx.epc=all"] {
            assert_eq!(Name::parse(good).unwrap().to_string(), good);
        }
        let bad =
            ["", "gpu0", "/b=c", "a/=c", "a/b=", "a/b", "1a/b=c", "a/1b=c", "a/b/c=d", "a/b=c=d", "a./b=c", "a/b-=c", "a/b=.c", "a/b=ü"];
        for bad in bad {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn fields_and_annotations_are_one_list() {
        let device = |name: &str| CDIDevice { name: name.into(), ..Default::default() };
        let mut config = ContainerConfig { CDI_devices: vec![device("a/b=1"), device("a/b=1")], ..Default::default() };
        config.annotations.insert("cdi.k8s.io/plugin_1".into(), "a/b=2,a/b=1".into());
        config.annotations.insert("other".into(), "a/b=3".into());
        let names: Vec<_> = requested(&config).unwrap().iter().map(Name::to_string).collect();
        assert_eq!(names, ["a/b=1", "a/b=2"]);

        config.annotations.insert("cdi.k8s.io/plugin_2".into(), "a/b=2, a/b=1".into());
        let error = requested(&config).unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains("cdi.k8s.io/plugin_2"), "{error}");
        config.CDI_devices[0].name = "gpu".into();
        assert!(requested(&config).unwrap_err().message().starts_with("CDI_devices: \"gpu\""));
    }
}
