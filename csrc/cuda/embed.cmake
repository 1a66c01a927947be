# cmake -DSOURCES=csrc -DOUTPUT=file.cpp -P embed.cmake: what NVRTC compiles at run time (compiled.h), as text in C++.
# The files with such kernels, and all that they include but for their host's part.
file(GLOB files RELATIVE ${SOURCES} ${SOURCES}/cuda/attention_sm80_*.cu ${SOURCES}/cuda/attention_places.h
  ${SOURCES}/cuda/attention_schedule.h ${SOURCES}/cuda/*.cuh ${SOURCES}/cuda/ptx/*.cuh
  ${SOURCES}/common/half.h ${SOURCES}/ops/attention_band.h ${SOURCES}/ops/philox.h)
set(entries "")
foreach(file ${files})
  file(READ ${SOURCES}/${file} text)
  string(APPEND entries "{\"${file}\", R\"source(${text})source\"},\n")
endforeach()
file(WRITE ${OUTPUT} "#include \"cuda/compiled.h\"\n\nnamespace llmengine::cuda {\n\n"
  "std::map<std::string, std::string> sources() {\n  return {\n${entries}};\n}\n\n}  // namespace llmengine::cuda\n")
