package main

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// These are the parts of SPDX 2.3 that are written (spdx.github.io/spdx-spec/v2.3, clauses 6, 7 and 11).
type (
	spdxDocument struct {
		SPDXVersion       string             `json:"spdxVersion"`
		DataLicense       string             `json:"dataLicense"`
		SPDXID            string             `json:"SPDXID"`
		Name              string             `json:"name"`
		DocumentNamespace string             `json:"documentNamespace"`
		CreationInfo      spdxCreation       `json:"creationInfo"`
		Packages          []spdxPackage      `json:"packages"`
		Relationships     []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		SPDXID           string         `json:"SPDXID"`
		Name             string         `json:"name"`
		VersionInfo      string         `json:"versionInfo"`
		DownloadLocation string         `json:"downloadLocation"`
		FilesAnalyzed    bool           `json:"filesAnalyzed"`
		LicenseConcluded string         `json:"licenseConcluded"`
		LicenseDeclared  string         `json:"licenseDeclared"`
		CopyrightText    string         `json:"copyrightText"`
		Checksums        []spdxChecksum `json:"checksums,omitempty"`
		ExternalRefs     []spdxRef      `json:"externalRefs"`
		PrimaryPurpose   string         `json:"primaryPackagePurpose"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		Element string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		Related string `json:"relatedSpdxElement"`
	}
)

const noAssertion = "NOASSERTION"

// sbom writes what an architecture's program is made of, as its linker has noted it, and returns the file.
func (r *release) sbom(arch string, modules []module) (string, error) {
	program := filepath.Join(r.dist, "linux-"+arch, "breakwater")
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", err
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	sum := digest.FromBytes(binary).Encoded()
	licence := map[string]string{}
	for _, m := range modules {
		licence[m.path] = m.licence
	}
	const thisProgram = "SPDXRef-breakwater"
	doc := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT",
		Name:              fmt.Sprintf("breakwater-%s-linux-%s", r.version, arch),
		DocumentNamespace: fmt.Sprintf("urn:breakwater:%s:linux-%s:sha256:%s", r.version, arch, sum),
		CreationInfo:      spdxCreation{r.time.Format(time.RFC3339), []string{"Tool: breakwater-pack"}},
		Packages: []spdxPackage{{
			SPDXID: thisProgram, Name: "breakwater", VersionInfo: r.version, DownloadLocation: noAssertion,
			LicenseConcluded: "Apache-2.0", LicenseDeclared: "Apache-2.0", CopyrightText: noAssertion,
			Checksums: []spdxChecksum{{"SHA256", sum}}, PrimaryPurpose: "APPLICATION",
			ExternalRefs: []spdxRef{{"PACKAGE-MANAGER", "purl", "pkg:generic/breakwater@" + r.version}},
		}},
		Relationships: []spdxRelationship{{"SPDXRef-DOCUMENT", "DESCRIBES", thisProgram}},
	}
	add := func(path, version, purl string) error {
		if licence[path] == "" {
			return fmt.Errorf("%s is in the program, and its licence was not looked at", path)
		}
		id := fmt.Sprintf("SPDXRef-module-%d", len(doc.Packages))
		doc.Packages = append(doc.Packages, spdxPackage{
			SPDXID: id, Name: path, VersionInfo: version, DownloadLocation: noAssertion,
			LicenseConcluded: licence[path], LicenseDeclared: licence[path], CopyrightText: noAssertion, PrimaryPurpose: "LIBRARY",
			ExternalRefs: []spdxRef{{"PACKAGE-MANAGER", "purl", purl}},
		})
		doc.Relationships = append(doc.Relationships, spdxRelationship{thisProgram, "DEPENDS_ON", id})
		return nil
	}
	if err := add("std", info.GoVersion, "pkg:golang/std@"+strings.TrimPrefix(info.GoVersion, "go")); err != nil {
		return "", err
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		if err := add(m.Path, m.Version, "pkg:golang/"+m.Path+"@"+m.Version); err != nil {
			return "", err
		}
	}
	content, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return "", err
	}
	file := filepath.Join(r.dist, doc.Name+".spdx.json")
	return file, os.WriteFile(file, append(content, '\n'), 0o644)
}
